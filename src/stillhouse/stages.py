"""Each stage of a run: what it depends on, and the work that fills its folder.

A function here takes the job and the finished stages that it reads, and returns a `StagePlan`; it
does nothing yet. `stillhouse.shipping` has the last stages, `stillhouse.runner` the order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import stillhouse.signals
import stillhouse.teachers
from stillhouse import account
from stillhouse.data import Windows, build, open_windows
from stillhouse.data.fingerprint import sources_fingerprint
from stillhouse.errors import SignalError
from stillhouse.evaluate import evaluate
from stillhouse.hardware import choose_precision, default_device, leads, peak_memory_bytes
from stillhouse.job import Job, configs, planned_objective, planned_size, signals_encoding
from stillhouse.progress import note
from stillhouse.quantize import TRAINING, quantize, train_quantized
from stillhouse.recipe.schema import EvaluateRecipe, LogitsTerm, ObjectiveRecipe
from stillhouse.runfolder import Outcome, RunFolder, Stage
from stillhouse.signals import LMHead
from stillhouse.signals.encodings import Encoding, FrozenHead, Hidden
from stillhouse.signals.manifest import Settings, read_manifest
from stillhouse.signals.store import Store, open_store
from stillhouse.students import build_student
from stillhouse.synthesis.request import endpoint_of
from stillhouse.teachers import ModelSource, load_model, load_tokenizer
from stillhouse.teachers.hashing import code_sha256
from stillhouse.teachers.head import head_sha256, load_head
from stillhouse.teachers.scoring import chosen_encoding, lacking_tokens, local_teacher, score
from stillhouse.teachers.vocabulary import tokenizer_identity
from stillhouse.training import (
    CHECKPOINTS,
    MODEL,
    stored_temperature,
    train,
)

EVALUATION = "evaluation.json"
STORE = "store"

BASELINE = ObjectiveRecipe(terms=[LogitsTerm(divergence="cross_entropy")])


@dataclass(frozen=True)
class StagePlan:
    """inputs: all that the result depends on. together: every process of a torchrun takes part.

    version: raised when the stage's code changes what it writes, so that it is done again.
    """

    name: str
    inputs: dict[str, Any]
    work: Callable[[Path], Outcome]
    version: int = 1
    resumable: bool = False
    together: bool = False
    scratch: tuple[str, ...] = field(default=())

    @property
    def depends_on(self) -> dict[str, Any]:
        return {**self.inputs, "version": self.version}


Do = Callable[[StagePlan], Stage]
"""Does a stage, or finds it done."""


def doing(folder: RunFolder) -> Do:
    """How the leading process does a stage."""

    def do(plan: StagePlan) -> Stage:
        return folder.stage(
            plan.name,
            plan.depends_on,
            plan.work,
            resumable=plan.resumable,
            scratch=plan.scratch,
        )

    return do


def telling(folder: RunFolder, finished: list[Stage]) -> Do:
    """As `doing`; says how long each took, and adds it to `finished`."""
    quietly = doing(folder)

    def do(plan: StagePlan) -> Stage:
        began = time.monotonic()
        stage = quietly(plan)
        took = "already done" if stage.reused else f"{time.monotonic() - began:,.1f} s"
        note(f"{plan.name + ':':<10} {took}")
        finished.append(stage)
        return stage

    return do


@dataclass(frozen=True)
class StoredSignals:
    """A finished store. key: names what it holds."""

    path: Path
    key: str


def open_data(data: Stage) -> tuple[Windows, Windows]:
    return open_windows(data.path / "train"), open_windows(data.path / "heldout")


# --- the stages, in order --------------------------------------------------------------------


def data(job: Job) -> StagePlan:
    section, text = job.recipe.data, job.text
    read, files = section, [*section.sources, *section.heldout_sources]
    if text is not None:
        read, files = text.put_into(section, job.base), text.others(section, job.base)

    def work(out: Path) -> Outcome:
        tokenizer = load_tokenizer(job.tokenizer_path)
        built = build(read, tokenizer, seed=job.recipe.seed, base=job.base, out=out)
        return Outcome(summary=asdict(built))

    inputs: dict[str, Any] = {
        "recipe": section.model_dump(mode="json"),
        "seed": job.recipe.seed,
        "tokenizer": (job.pretrained or job.teacher).fingerprint,
        "sources": sources_fingerprint(files, job.base),
    }
    if text is not None:
        inputs["synthesized"] = text.sha256
    return StagePlan("data", inputs, work, version=2)


def signals(job: Job, data: Stage, student: Stage | None) -> StagePlan:
    """The teacher is asked about every training window, once; students then read its answers.

    student: whose head its answers are for, where they are for one (`for_one_head`).
    """
    section = job.recipe.signals
    assert section is not None
    objective = planned_objective(job)
    encoding = signals_encoding(job, objective)
    temperature = stored_temperature(objective, encoding)
    if section.server is not None and temperature != 1.0:
        raise SignalError(
            f"a server answers at temperature 1, and a term asks for {temperature:g}",
            where="objective.terms",
            fix="use temperature 1, or ask a local teacher (no signals.server)",
        )
    student_head = None
    if isinstance(encoding, FrozenHead):
        assert student is not None
        student_head = _head(job, student)
    identity = signal_identity(job, student_head)
    # Measurements on the way then know the teacher too.
    with_heldout = job.recipe.train.evaluate_every is not None

    def settings(encoding: Encoding, source: str) -> Settings:
        code = code_sha256(stillhouse.signals, stillhouse.teachers)
        provenance = {"asked": source, "data": data.digest, "code": code}
        seed = job.recipe.seed
        return Settings(encoding, job.vocabulary, identity, temperature, seed, provenance)

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        asked = [windows, heldout] if with_heldout else [windows]
        if section.server is not None:
            from stillhouse.teachers.server import ASKED_TOGETHER, server_name, server_teacher

            wanted = settings(encoding, server_name(section.server))
            ask = server_teacher(section.server, wanted)
            size, together = planned_size(configs(job)[1]), ASKED_TOGETHER
        else:
            device = default_device()
            dtype = choose_precision(job.recipe.train.precision, device).dtype
            code = job.trust_remote_code
            teacher = load_model(job.teacher.path, dtype=dtype, trust_remote_code=code).to(device)
            chosen = chosen_encoding(
                section,
                encoding,
                teacher,
                windows,
                vocabulary=job.vocabulary,
                temperature=temperature,
                out=out / STORE,
            )
            wanted = settings(chosen, f"{job.teacher.described} in {dtype}")
            ask = local_teacher(teacher, wanted, student_head)
            size, together = account.count_parameters(teacher), None
        manifest = score(ask, asked, wanted, out / STORE, together=together)
        quality = manifest.quality
        kept = f": {quality.entries:.1f} tokens of {job.vocabulary:,}" if quality.entries else ""
        note(f"{quality.bytes:,.1f} bytes a token{kept}")
        tokens = sum(each.supervised_tokens for each in asked)
        return Outcome(
            tokens=tokens,
            flops=account.forward_flops(size.head_once, tokens),
            peak_memory_bytes=peak_memory_bytes(),
            summary={**asdict(quality), "store_bytes": manifest.bytes},
        )

    inputs = {
        "recipe": section.model_dump(mode="json"),
        "temperature": temperature,
        "vocabulary": job.vocabulary,
        "precision": job.recipe.train.precision,
        "seed": job.recipe.seed,
        "data": data.digest,
        "heldout": with_heldout,
        **identity,
    }
    return StagePlan("signals", inputs, work, version=2, resumable=True)


def for_one_head(job: Job) -> bool:
    """Whether signals are made for one student's head, which must then be there before them."""
    return isinstance(signals_encoding(job, planned_objective(job)), FrozenHead)


def signal_identity(job: Job, student_head: LMHead | None) -> dict[str, str]:
    """What a store must have been recorded with to be this run's. Not the data: rows are found by
    what they are, so that a store of more text, or of some of it, is as good.

    student_head: of a store that is for this head alone.
    """
    tokenizer = load_tokenizer(job.tokenizer_path, trust_remote_code=job.trust_remote_code)
    teacher, section = job.teacher.fingerprint, job.recipe.signals
    if section is not None and section.answers is not None:
        assert job.recipe.synthesize is not None
        api = job.recipe.synthesize.teacher.api
        assert api is not None
        teacher = f"{api.model} at {endpoint_of(api.base_url)}"
    identity = {"teacher": teacher, **tokenizer_identity(tokenizer)}
    return identity if student_head is None else {**identity, "head": head_sha256(student_head)}


def _head(job: Job, student: Stage) -> LMHead:
    code = job.trust_remote_code
    return load_head(student.path / MODEL, dtype=torch.float32, trust_remote_code=code)


def stored_signals(job: Job, recorded: Stage | None) -> StoredSignals | None:
    """The store that training reads: the run's own, or the one that the recipe names."""
    section = job.recipe.signals
    if section is None:
        return None
    if recorded is not None:
        # The stage's key, not its digest: after a resume, other shards hold the same rows.
        return StoredSignals(recorded.path / STORE, recorded.path.name)
    assert section.store is not None
    path = job.base / section.store
    return StoredSignals(path, read_manifest(path).digest())


def student(job: Job, data: Stage) -> StagePlan:
    section = job.recipe.student

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        summary = build_student(
            section,
            teacher=job.pruned or job.teacher,
            windows=windows,
            heldout=heldout,
            seed=job.recipe.seed,
            base=job.base,
            out=out / MODEL,
            trust_remote_code=job.trust_remote_code,
        )
        return Outcome(peak_memory_bytes=peak_memory_bytes(), summary=summary)

    inputs = {
        # How the shape was searched does not matter once it is found.
        "recipe": section.model_dump(mode="json", exclude={"search", "target"}),
        "seed": job.recipe.seed,
        "teacher": job.teacher.fingerprint,
        "pretrained": job.pretrained and job.pretrained.fingerprint,
        "pruned": job.pruned and job.pruned.fingerprint,
        "data": data.digest,
    }
    return StagePlan("student", inputs, work, version=4)


def training(job: Job, data: Stage, student: Stage, stored: StoredSignals | None) -> StagePlan:
    inputs: dict[str, Any] = {"objective": job.recipe.objective.model_dump(mode="json")}
    if stored is not None:
        inputs["signals"] = stored.key
    objective = job.recipe.objective
    return _training("train", inputs, job, data, student, objective, job.guides, stored)


def baseline(job: Job, data: Stage, student: Stage) -> StagePlan:
    """The same student on the same data by plain next-token loss: what distillation adds to."""
    return _training("baseline", {}, job, data, student, BASELINE, ())


def _training(
    name: str,
    inputs: dict[str, Any],
    job: Job,
    data: Stage,
    student: Stage,
    objective: ObjectiveRecipe,
    teachers: Sequence[ModelSource],
    stored: StoredSignals | None = None,
) -> StagePlan:
    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        first = teachers[0].path if teachers else None
        asked = _whom_to_ask(job, first, stored, windows, student)
        result = train(
            student.path / MODEL,
            asked.teacher,
            windows,
            heldout,
            section=job.recipe.train,
            objective=objective,
            vocabulary=job.vocabulary,
            seed=job.recipe.seed,
            out=out,
            store=asked.store,
            stored_teacher=asked.stored_teacher,
            asked_share=asked.share,
            more_teachers=[teacher.path for teacher in teachers[1:]],
            trust_remote_code=job.trust_remote_code,
        )
        return Outcome(
            tokens=result.tokens,
            flops=result.flops,
            peak_memory_bytes=result.peak_memory_bytes,
            seconds=result.seconds,
            summary=asdict(result),
        )

    everything = {
        **inputs,
        "recipe": job.recipe.train.model_dump(mode="json", exclude={"report_to", "teachers"}),
        "seed": job.recipe.seed,
        "teachers": [teacher.fingerprint for teacher in teachers],
        "data": data.digest,
        "student": student.digest,
    }
    return StagePlan(name, everything, work, resumable=True, together=True, scratch=(CHECKPOINTS,))


@dataclass(frozen=True)
class _Asked:
    """teacher: loaded beside the student, or None. share: of the tokens it is asked about.

    stored_teacher: the store's, where its hidden states are stored.
    """

    teacher: Path | None
    store: Store | None
    share: float
    stored_teacher: Path | None = None


def _whom_to_ask(
    job: Job,
    teacher: Path | None,
    stored: StoredSignals | None,
    windows: Windows,
    student: Stage,
) -> _Asked:
    """A live teacher, a store, or both where the store lacks some of the windows."""
    if stored is None:
        return _Asked(teacher, None, 1.0)
    store = _open(job, stored, student)
    lacking = _lacking(job, store, windows)
    hidden = isinstance(store.settings.encoding, Hidden)
    return _Asked(
        teacher if lacking else None,
        store,
        lacking / windows.supervised_tokens,
        teacher if hidden else None,
    )


def _open(job: Job, stored: StoredSignals, student: Stage) -> Store:
    """Raises SignalError: the store is of another teacher, tokenizer, template, temperature or
    head."""
    objective = planned_objective(job)
    encoding = signals_encoding(job, objective)
    head = _head(job, student) if isinstance(encoding, FrozenHead) else None
    return open_store(
        stored.path,
        signal_identity(job, head),
        temperature=stored_temperature(objective, encoding),
        vocabulary=job.vocabulary,
    )


def _lacking(job: Job, store: Store, windows: Windows) -> int:
    """Training tokens that are to be asked about live. Raises SignalError where they may not."""
    lacking = lacking_tokens(store, windows)
    if lacking:
        told = f"the store lacks {lacking:,} of {windows.supervised_tokens:,} training tokens"
        section = job.recipe.signals
        if section is None or section.missing == "error":
            raise SignalError(
                told,
                where=store.path,
                fix="set signals.missing: live to ask the teacher about them, or record a store "
                "of this data",
            )
        note(f"{told}: the teacher is asked about them live")
    return lacking


def quantization(job: Job, data: Stage, trained: Stage) -> StagePlan:
    """The trained student's matrices rounded onto a grid; which are left alone, by measurement."""
    section = job.recipe.quantize
    assert section is not None

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        result = quantize(
            trained.path / MODEL,
            out,
            section=section,
            heldout=heldout,
            vocabulary=job.vocabulary,
            seed=job.recipe.seed,
            windows=windows,
            trust_remote_code=job.trust_remote_code,
        )
        return Outcome(peak_memory_bytes=peak_memory_bytes(), summary=asdict(result))

    inputs = {
        "recipe": section.model_dump(mode="json", exclude={"qat"}),
        "seed": job.recipe.seed,
        "vocabulary": job.vocabulary,
        "data": data.digest,
        "trained": trained.digest,
    }
    return StagePlan("quantize", inputs, work, version=2)


def quantized_training(
    job: Job, data: Stage, trained: Stage, rounded: Stage, stored: StoredSignals | None
) -> StagePlan:
    """The trained student distilled on while it is rounded: quantization-aware distillation."""
    section, train_section = job.recipe.quantize, job.recipe.train
    assert section is not None
    assert section.qat is not None

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        asked = _whom_to_ask(job, job.teacher.path, stored, windows, trained)
        result = train_quantized(
            trained.path / MODEL,
            rounded.path,
            asked.teacher,
            windows,
            heldout,
            section=section,
            recipe=train_section,
            objective=job.recipe.objective,
            vocabulary=job.vocabulary,
            seed=job.recipe.seed,
            out=out,
            main=leads(),
            store=asked.store,
            stored_teacher=asked.stored_teacher,
            asked_share=asked.share,
            trust_remote_code=job.trust_remote_code,
        )
        return Outcome(
            tokens=result.tokens,
            flops=result.flops,
            peak_memory_bytes=result.peak_memory_bytes,
            seconds=result.seconds,
            summary={**rounded.summary, "training": asdict(result)},
        )

    inputs = {
        "qat": section.qat.model_dump(mode="json"),
        "objective": job.recipe.objective.model_dump(mode="json"),
        "signals": stored and stored.key,
        "recipe": train_section.model_dump(mode="json", exclude={"report_to", "teachers"}),
        "seed": job.recipe.seed,
        "teacher": job.teacher.fingerprint,
        "data": data.digest,
        "trained": trained.digest,
        "rounded": rounded.digest,
    }
    return StagePlan("qat", inputs, work, resumable=True, together=True, scratch=(TRAINING,))


def evaluation(
    job: Job,
    data: Stage,
    student: Stage,
    trained: Stage,
    baseline: Stage | None,
    quantized: list[Stage],
) -> StagePlan:
    section = _with_found_tasks(job.recipe.evaluate, job.base)

    def work(out: Path) -> Outcome:
        _, heldout = open_data(data)
        paths = {
            "teacher": job.teacher.path,
            "untrained": student.path / MODEL,
            "student": trained.path / MODEL,
        }
        if baseline is not None:
            paths["fine_tuned"] = baseline.path / MODEL
        sizes = {}
        for stage in quantized:
            role = {"quantize": "quantized", "qat": "quantized_trained"}[stage.name]
            paths[role], sizes[role] = stage.path / MODEL, stage.summary["bytes"]
        found = evaluate(
            paths,
            section=section,
            windows=heldout,
            seed=job.recipe.seed,
            vocabulary=job.vocabulary,
            precision=choose_precision(job.recipe.train.precision, default_device()),
            export_dtype=getattr(torch, job.recipe.export.dtype),
            sizes=sizes,
            trust_remote_code=job.trust_remote_code,
        )
        found.save(out / EVALUATION)
        tokens = sum(model.fidelity.tokens for model in found.models)
        flops = sum(
            account.forward_flops(model.parameters, model.fidelity.tokens) for model in found.models
        )
        return Outcome(tokens, flops, peak_memory_bytes())

    inputs = {
        "recipe": job.recipe.evaluate.model_dump(mode="json"),
        "precision": job.recipe.train.precision,
        "dtype": job.recipe.export.dtype,
        "seed": job.recipe.seed,
        "teacher": job.teacher.fingerprint,
        "data": data.digest,
        "student": student.digest,
        "trained": trained.digest,
        "baseline": baseline and baseline.digest,
        "quantized": [stage.digest for stage in quantized],
    }
    return StagePlan("evaluate", inputs, work, version=2)


def _with_found_tasks(section: EvaluateRecipe, base: Path) -> EvaluateRecipe:
    """Paths of lm-eval tasks start from the recipe's folder; its task names stay names."""
    if section.lm_eval is None:
        return section
    tasks = [str(base / task) if (base / task).exists() else task for task in section.lm_eval.tasks]
    folder = section.lm_eval.include_path
    found = {"tasks": tasks, "include_path": None if folder is None else str(base / folder)}
    return section.model_copy(update={"lm_eval": section.lm_eval.model_copy(update=found)})
