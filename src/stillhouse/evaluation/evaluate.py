"""Evaluate a run's models, the teacher first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from stillhouse.data.windows import WindowSet
from stillhouse.errors import ModelError
from stillhouse.evaluation.evaluate_config import EvaluateRecipe
from stillhouse.evaluation.kept_teacher import KeptTeacher, save_rows
from stillhouse.evaluation.lm_eval import run_tasks
from stillhouse.evaluation.measuring import TEACHER, Measuring
from stillhouse.evaluation.own_answers import OwnAnswers
from stillhouse.evaluation.results import (
    Evaluation,
    Speed,
    farther_after_training,
    role_name,
)
from stillhouse.evaluation.speed import (
    DECODE_TOKENS,
    PROMPT_TOKENS,
    ROUNDS,
    measure_peak_memory,
    measure_rates,
)
from stillhouse.hardware import Precision, default_device, free_memory, free_memory_bytes
from stillhouse.launch import leads
from stillhouse.progress import bar, note
from stillhouse.scratch import temporary_folder
from stillhouse.section import made
from stillhouse.shared_work import all_processes
from stillhouse.teachers.aligned_text import Alignment
from stillhouse.teachers.load_model import load_config, load_model, load_tokenizer
from stillhouse.teachers.model_source import AnyModel, ModelSource, source_of
from stillhouse.teachers.planned_model import shape_key
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.sharded_teacher import ShardedTeacher
from stillhouse.teachers.stored_head import load_head
from stillhouse.teachers.weights import stored_dtypes, weight_files


def evaluate(
    checkpoints: Mapping[str, AnyModel],
    *,
    section: EvaluateRecipe,
    windows: WindowSet,
    seed: int,
    vocabulary: int,
    precision: Precision,
    export_dtype: torch.dtype | None = None,
    sizes: Mapping[str, int] | None = None,
    prepare: Mapping[str, Callable[[Any], object]] | None = None,
    load_sharded: Callable[[], ShardedTeacher] | None = None,
    kept: KeptTeacher | None = None,
    keep: Path | None = None,
    alignment: Alignment | None = None,
) -> Evaluation:
    """Measure models by role (teacher, untrained, student, fine_tuned, quantized).

    Everything is computed in `precision` on the default device. Under torchrun, every process calls
    this; they share the windows and the own-text prompts, and the main process measures the rest.

    Fidelity and generations use one model at a time. Memory then holds that model, the teacher's
    head, and the teacher's hidden states on the held-out text, and, if own text is measured, every
    model's head and its hidden states on its answers. To measure speed, all models are in memory.

    Args:
        checkpoints: models by role, which must include the teacher.
        windows: the held-out text; under torchrun, all of it.
        vocabulary: number of tokens of the shared vocabulary; head rows after them are padding.
        export_dtype: report sizes as if weights were stored in this dtype; None: as they are.
        sizes: bytes of the roles that are stored in a different form, such as quantized ones. Their
            speed and memory are not measured, since their checkpoints are floating-point
            equivalents.
        prepare: by role, called with the loaded model to add what a checkpoint does not contain,
            such as rounding of inputs. Not used for `lm_eval`.
        load_sharded: loads the teacher sharded across processes. Its answers to the prompts, its
            speed, and its memory are then not measured.
        kept: the teacher's measurements from an earlier evaluation. The teacher is then only
            loaded to measure its speed.
        keep: a folder for the teacher's measurements; see `KeptTeacher`.
        alignment: for a teacher whose tokenizer differs from the windows'. KL and top-1 agreement
            are then over shared roots.

    Raises:
        ModelError: there is no teacher, or a model cannot be loaded or does not fit.
        DataError: the held-out text cannot be used to measure.
    """
    if TEACHER not in checkpoints:
        names = ", ".join(checkpoints)
        raise ModelError(
            "an evaluation needs a teacher to compare with",
            where=names,
            fix=f"pass the teacher as {TEACHER!r}",
        )
    teacher = source_of(checkpoints[TEACHER])
    sources = {TEACHER: teacher, **{role: source_of(one) for role, one in checkpoints.items()}}
    processes = all_processes()
    known = vocabulary if alignment is None else min(vocabulary, alignment.aligner.teacher.size)
    setup = _Setup(default_device(), precision.dtype, known, seed)
    tokenizer = alignment.aligner.student.tokenizer if alignment else load_tokenizer(teacher)
    own = OwnAnswers.planned(section.own_text, tokenizer, windows, seed, alignment)
    measuring = Measuring(section, tokenizer, windows, vocabulary, seed, processes, own, alignment)

    def load_teacher() -> tuple[Any, ShardedTeacher | None]:
        sharded = load_sharded() if load_sharded else None
        return (setup.load(teacher), None) if sharded is None else (sharded.model, sharded)

    if kept is not None and (own is not None or kept.dtype != str(setup.dtype)):
        kept = None
    for role, source in sources.items():
        if role == TEACHER and kept is not None:
            head = load_head(source, dtype=setup.dtype)
            measuring.add_kept(kept, head.to(setup.device))
            continue
        model, sharded = load_teacher() if role == TEACHER else (setup.load(source), None)
        if prepare is not None and role in prepare:
            prepare[role](model)
        measuring.add(role, model, weight_bytes(source.path, model, export_dtype), sharded)
        del model, sharded
        free_memory()  # Models have reference cycles, so two would stay in memory without this.
    if keep is not None:
        save_rows(keep, measuring.teacher_answers)
    measuring.score_own_text(load_teacher)
    results = measuring.results
    farther = farther_after_training(list(results.values()))
    notes = [
        *farther,
        f"Fidelity: measured on {measuring.tokens:,} tokens in {len(windows):,} held-out windows. "
        f"Matrix products: {precision.reason}.",
        *measuring.folded_notes(),
        *measuring.own_text_notes(),
    ]
    sizes = sizes or {}
    results |= {role: replace(results[role], bytes_on_disk=size) for role, size in sizes.items()}
    if not leads():
        return Evaluation(list(results.values()), [], notes)
    for sentence in farther:
        note(f"warning: {sentence}")
    if load_sharded is not None:
        notes.append("The teacher is sharded, so its answers, speed, and memory are not measured.")
        sources.pop(TEACHER)
    if section.speed:
        timed = {role: source for role, source in sources.items() if role not in sizes}
        fitting = fitting_together(
            {role: results[role].parameters * setup.dtype.itemsize for role in timed},
            free_memory_bytes(setup.device),
        )
        notes += [
            f"{role_name(role)}: speed and memory are not measured, because its weights do not "
            f"fit on {setup.device} together with smaller models."
            for role in timed
            if role not in fitting
        ]
        shapes = _same_shapes({role: timed[role] for role in timed if role in fitting})
        for role, speed in _speeds(shapes, sources, setup).items():
            results[role] = replace(results[role], speed=speed)
        if any(len(roles) > 1 for roles in shapes.values()):
            notes.append("Models with the same shape share one measurement of speed and memory.")
        notes.append(
            f"Speed: one sequence with {PROMPT_TOKENS} prompt tokens and {DECODE_TOKENS} generated "
            f"tokens, median of {ROUNDS} alternating rounds on {setup.device}, "
            f"{torch.get_num_threads()} threads."
        )
    if kept is not None:
        sources.pop(TEACHER, None)
    if section.lm_eval is not None:
        for role, source in sources.items():
            tasks = run_tasks(
                source,
                section.lm_eval,
                tokenizer=teacher if alignment is None else source,
                dtype=setup.dtype,
                device=setup.device,
                seed=seed,
            )
            results[role] = replace(results[role], tasks=tasks)
    if keep is not None:
        texts = measuring.texts.get(TEACHER)
        KeptTeacher(keep, results[TEACHER], texts, str(setup.dtype)).save()
    models = list(results.values())
    return Evaluation(models, measuring.generations(), notes, measuring.scored_answers)


@dataclass(frozen=True)
class _Setup:
    """How models are loaded and run. vocabulary: every model knows the token ids below it."""

    device: torch.device
    dtype: torch.dtype
    vocabulary: int
    seed: int

    def load(self, source: ModelSource) -> Any:
        return load_model(source, dtype=self.dtype).to(self.device)


def fitting_together(sizes: Mapping[str, int], available: int) -> list[str]:
    """The roles, from the smallest model up, whose weights fit together in `available` bytes, a
    tenth of which is reserved for everything else; at least one role."""
    roles = sorted(sizes, key=lambda role: sizes[role])
    totals = accumulate(sizes[role] for role in roles)
    return roles[: max(1, sum(total <= 0.9 * available for total in totals))]


def evaluate_models(
    models: Mapping[str, Any],
    tokenizer: Any,
    windows: WindowSet,
    *,
    vocabulary: int,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 64,
    own_text: int = 0,
    seed: int = 0,
    alignment: Alignment | None = None,
) -> Evaluation:
    """Measure fidelity and generations of models in memory, each in its own dtype.

    Args:
        models: by role, the teacher first, all on one device.
        tokenizer: for the prompts.
        own_text: how many prompts from the held-out text every model answers, for the teacher to
            score; 0: own text is not measured.
        alignment: see `evaluate`.

    Raises:
        DataError: the held-out text cannot be used to measure.
    """
    options = {"prompts": list(prompts), "max_new_tokens": max_new_tokens, "speed": False}
    options |= {"own_text": {"answers": own_text}}
    section = made(EvaluateRecipe, options, "evaluate")
    own = OwnAnswers.planned(section.own_text, tokenizer, windows, seed, alignment)
    measuring = Measuring(
        section, tokenizer, windows, vocabulary, seed, own_answers=own, alignment=alignment
    )
    for role, model in models.items():
        weights = sum(each.numel() * each.element_size() for each in model.parameters())
        measuring.add(role, model, weights)
    measuring.score_own_text(lambda: (models[TEACHER], None))
    notes = [
        f"{len(windows):,} held-out windows; each model computes in its own dtype.",
        *measuring.folded_notes(),
        *measuring.own_text_notes(),
    ]
    results, answers = list(measuring.results.values()), measuring.scored_answers
    return Evaluation(results, measuring.generations(), notes, answers)


def _same_shapes(sources: Mapping[str, ModelSource]) -> dict[str, list[str]]:
    """Groups of roles whose models have the same shape, by each group's first role."""
    shapes: dict[str, list[str]] = {}
    for role, source in sources.items():
        shapes.setdefault(shape_key(load_config(source)), []).append(role)
    return {roles[0]: roles for roles in shapes.values()}


def _speeds(
    shapes: Mapping[str, list[str]], sources: Mapping[str, ModelSource], setup: _Setup
) -> dict[str, Speed]:
    """Speed and memory by role. shapes: see `_same_shapes`; each group is measured once."""
    peaks = {}
    with bar("Memory and speed", len(shapes) + ROUNDS + 1, unit="measurements") as advance:
        for role in shapes:
            with _stored_as_used(sources[role], setup) as stored:
                peaks[role] = measure_peak_memory(stored, setup.dtype, setup.device)
            advance(1)
        models = {role: setup.load(sources[role]) for role in shapes}
        rates = measure_rates(models, setup.vocabulary, seed=setup.seed, advance=advance)
    speeds: dict[str, Speed] = {}
    for first, found in rates.items():
        speed = Speed(found.prefill_tokens_per_s, found.decode_tokens_per_s, peaks[first])
        speeds |= dict.fromkeys(shapes[first], speed)
    return speeds


@contextmanager
def _stored_as_used(source: ModelSource, setup: _Setup) -> Iterator[ModelSource]:
    """The checkpoint in the dtype that it is used in. If its files have a different dtype, this is
    a temporary copy, because their mapped pages would count as memory too."""
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}.get(setup.dtype)
    if setup.device.type != "cpu" or stored_dtypes(source.path) == {name}:
        yield source
        return
    with temporary_folder("stillhouse-memory-") as folder:
        with quiet():
            setup.load(source).save_pretrained(folder)
        free_memory()
        for code in source.path.glob("*.py"):
            shutil.copy(code, folder)
        yield source.derived(Path(folder))


def weight_bytes(path: Path, model: Any, dtype: torch.dtype | None) -> int:
    """Size of the model's safetensors files in bytes; with `dtype`, of its weights in that
    dtype."""
    if dtype is not None:
        return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return sum(file.stat().st_size for file in weight_files(path))
