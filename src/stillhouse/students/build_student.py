"""Writes the student as it starts: a float32 checkpoint with a tokenizer, before any training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stillhouse.account import count_flops, count_parameters
from stillhouse.data.windows import WindowSet
from stillhouse.errors import RecipeError, RunError
from stillhouse.hardware import choose_precision, default_device
from stillhouse.progress import note
from stillhouse.pruning.calibrate import unseen
from stillhouse.pruning.domain import Domain, read_text
from stillhouse.pruning.kept_tokens import prune_tokenizer
from stillhouse.pruning.offload import load_offloaded, released_after_use, save_model
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.pruning_config import PruningMethod, VocabularyFile
from stillhouse.pruning.reference import mean_kl
from stillhouse.pruning.sizes import Sizes, check_sizes
from stillhouse.pruning.surgery import check_saved
from stillhouse.pruning.vocabulary_cut import expected_tokens, kept_token_ids, save_kept_ids
from stillhouse.students.random_student import overridden_config, random_model
from stillhouse.students.student_config import PretrainedStudent, PrunedStudent, RandomStudent
from stillhouse.teachers.load import load_config, load_model, load_tokenizer, save_tokenizer
from stillhouse.teachers.model_source import ModelSource, resolve_model
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.shared_vocabulary import check_rows, check_same_vocabulary

Summary = dict[str, Any]

STREAMS = 16
"""Copies of the residual stream on the calibration rows that fit beside a layer's cut: two streams
in a few places, and the activations of the FFN."""

CHECKED_TOKENS = 64
"""Tokens on which the saved student must give the logits of the one in memory."""


def build_student(
    section: PretrainedStudent | RandomStudent | PrunedStudent,
    *,
    teacher: ModelSource,
    windows: WindowSet,
    seed: int,
    base: Path,
    out: Path,
    trust_remote_code: bool = False,
    heldout: WindowSet | None = None,
) -> Summary:
    """Makes the student that `section` describes, saves it in `out`, and says what it is.

    `windows` is the training text (only a pruned student looks at it). `heldout`, where it is
    given, is only compared with it: a note warns of another domain, with the measured KL. `base`
    is what paths in the recipe are relative to. `trust_remote_code` is the teacher's. The summary
    is plain data for JSON: start, parameters (total, non_embedding, head_once), the teacher's
    parameters, notes, and for a pruned student `pruning` (see pruning.PruneReport) and its `flops`.
    A student with fewer tokens than its teacher gets a tokenizer of its own, and the map to the
    teacher's ids beside it (see pruning.kept_token_ids).
    Raises ModelError, RecipeError, DataError as its parts do; RunError when `out` is not writable.
    """
    kept_ids: tuple[int, ...] | None = None
    match section:
        case PretrainedStudent():
            model, tokenizer, summary = _pretrained(section, teacher, base, trust_remote_code)
        case RandomStudent():
            model, tokenizer, summary = _random(section, teacher, seed, base, trust_remote_code)
        case PrunedStudent():
            model, tokenizer, summary, kept_ids = _pruned(
                section, teacher, windows, seed, base, trust_remote_code, heldout
            )
    _save(model, tokenizer, out, kept_ids)
    if not trust_remote_code and not getattr(section, "trust_remote_code", False):
        rows = model.get_output_embeddings().weight.shape[0]
        check_saved(model, out, torch.arange(min(CHECKED_TOKENS, rows))[None])
    return {"start": section.start, "parameters": asdict(count_parameters(model)), **summary}


def _pretrained(
    section: PretrainedStudent, teacher: ModelSource, base: Path, trust_remote_code: bool
) -> tuple[Any, Any, Summary]:
    source = resolve_model(section.model, revision=section.revision, base=base)
    trust = section.trust_remote_code
    tokenizer = load_tokenizer(source.path, trust_remote_code=trust)
    match = check_same_vocabulary(
        load_tokenizer(teacher.path, trust_remote_code=trust_remote_code),
        tokenizer,
        teacher_rows=_rows(teacher.path, trust_remote_code),
        student_rows=_rows(source.path, trust),
    )
    model = load_model(source.path, dtype=torch.float32, trust_remote_code=trust)
    summary = {
        "model": source.described,
        "fingerprint": source.fingerprint,
        "vocabulary": asdict(match),
        "notes": list(match.warnings),
    }
    return model, tokenizer, summary


def _random(
    section: RandomStudent, teacher: ModelSource, seed: int, base: Path, trust_remote_code: bool
) -> tuple[Any, Any, Summary]:
    tokenizer = load_tokenizer(teacher.path, trust_remote_code=trust_remote_code)
    teacher_config = load_config(teacher.path, trust_remote_code=trust_remote_code)
    config = overridden_config(start_config(section, teacher_config, base), section.overrides)
    check_rows(tokenizer, config.get_text_config().vocab_size, "student")
    summary = {"overrides": dict(section.overrides), "notes": []}
    return random_model(config, seed), tokenizer, summary


def _pruned(
    section: PrunedStudent,
    teacher: ModelSource,
    windows: WindowSet,
    seed: int,
    base: Path,
    trust_remote_code: bool,
    heldout: WindowSet | None,
) -> tuple[Any, Any, Summary, tuple[int, ...] | None]:
    model = load_offloaded(teacher.path, trust_remote_code=trust_remote_code)
    before = count_parameters(model)
    if section.target is not None:
        raise RecipeError(
            "a student is made from sizes, and this one has a target",
            where="student.target",
            fix="search first (search.search_shape), as `stillhouse run` does",
        )
    explicit_sizes(section, model.config)
    tokenizer = load_tokenizer(teacher.path, trust_remote_code=trust_remote_code)
    device = _roomy_device(model, section.calibration_tokens)
    precision = choose_precision("auto", device)
    note(f"Pruning on {device} with products in {precision.reason}")
    model.to(device)
    with count_flops() as counted:
        kept_ids = _kept_ids(model, tokenizer, section, windows, seed, base, precision.dtype)
        if kept_ids is not None:
            tokenizer = prune_tokenizer(tokenizer, kept_ids)
        summary = _cut(model, section, windows, heldout, kept_ids, seed, precision.dtype)
    summary |= {"teacher_parameters": asdict(before), "flops": counted.flops}
    model.to("cpu")
    return model, tokenizer, summary, kept_ids


def _kept_ids(
    model: Any,
    tokenizer: Any,
    section: PrunedStudent,
    windows: WindowSet,
    seed: int,
    base: Path,
    dtype: torch.dtype,
) -> tuple[int, ...] | None:
    """The tokens that stay, where some are to go."""
    if section.vocabulary is None:
        return None
    wanted = section.vocabulary
    return kept_token_ids(
        tokenizer,
        windows,
        base / wanted.path if isinstance(wanted, VocabularyFile) else wanted,
        configs=(model.config, model.generation_config),
        expect=lambda: expected_tokens(model, windows, section.calibration_tokens, seed, dtype),
    )


def _cut(
    model: Any,
    section: PrunedStudent,
    windows: WindowSet,
    heldout: WindowSet | None,
    kept_ids: Sequence[int] | None,
    seed: int,
    dtype: torch.dtype,
) -> Summary:
    """Prunes in place, and compares the calibration text with the held-out text."""
    rest = unseen(windows, section.calibration_tokens, seed) if len(windows) else windows
    with released_after_use(model):
        read = [
            None if text is None else read_text(model, text, seed, dtype)
            for text in (None if heldout is None else rest if len(rest) else windows, heldout)
        ]
    report = prune_model(
        model,
        windows,
        hidden_method=section.hidden_method,
        kept_ids=kept_ids,
        reconstruct=section.refit,
        calibration_tokens=section.calibration_tokens,
        seed=seed,
        dtype=dtype,
        method=method_of(section),
        local_tokens=section.local_distillation or 0,
        **section.sizes,
    )
    summary: Summary = {
        "pruning": asdict(report),
        "notes": list(report.notes),
    }
    if read[0] is not None and read[1] is not None:
        kl = own = None
        if kept_ids is None:
            with released_after_use(model):
                kl = mean_kl(read[1].reference, model, dtype)
                own = mean_kl(read[0].reference, model, dtype) if len(rest) else None
        domain = Domain(read[0].perplexity, read[1].perplexity, kl, own)
        summary["domain"] = asdict(domain)
        warning = domain.warning()
        if warning is not None:
            note(f"warning: {warning}")
            summary["notes"].append(warning)
    return summary


def _roomy_device(model: Any, tokens: int) -> torch.device:
    """The GPU, where the float32 weights and the calibration rows fit into what is free there;
    else the CPU."""
    device = default_device()
    if device.type != "cuda":
        return device
    weights = sum(parameter.numel() for parameter in model.parameters())
    needed = 4 * (weights + STREAMS * tokens * model.config.hidden_size)
    free, _ = torch.cuda.mem_get_info(device)
    if needed <= free:
        return device
    note(f"{free / 2**30:.1f} GiB are free on {device}, and pruning needs {needed / 2**30:.1f}")
    return torch.device("cpu")


def method_of(section: PrunedStudent) -> PruningMethod:
    """What decides which parts stay, without the section's sizes."""
    return PruningMethod(**{key: getattr(section, key) for key in PruningMethod.model_fields})


def explicit_sizes(section: PrunedStudent, config: Any, *, owner: str | None = None) -> Sizes:
    """The sizes of the student without a target, all tokens counted where the text or a file
    decides. config: of what is pruned. owner: what an error calls it; None: as the section does.

    Raises RecipeError where they are not possible.
    """
    # Known without the text: how many tokens it has is not.
    vocabulary = section.vocabulary if isinstance(section.vocabulary, int) else None
    return check_sizes(
        config,
        {**section.sizes, "vocabulary": vocabulary},
        hidden_method=section.hidden_method,
        text_decides=vocabulary is None and section.vocabulary is not None,
        owner=owner or ("the teacher" if section.model is None else "the model that is pruned"),
    )


def start_config(section: RandomStudent, teacher_config: Any, base: Path) -> Any:
    """The configuration that `section.overrides` change: the named one, or the teacher's."""
    if section.config is None:
        return teacher_config
    return load_config(_config_folder(section.config, base))


def config_sha256(section: RandomStudent, base: Path) -> str | None:
    """Names the content of `section.config`; None where the teacher's is the start."""
    if section.config is None:
        return None
    file = _config_folder(section.config, base) / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _config_folder(name: str, base: Path) -> Path:
    """A folder that holds at least a config.json, or the Hub's model of that name."""
    for candidate in (base / name, Path.cwd() / name):
        if (candidate / "config.json").is_file():
            return candidate
    return resolve_model(name, base=base).path


def _rows(folder: Path, trust_remote_code: bool) -> int:
    config = load_config(folder, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)


def _save(model: Any, tokenizer: Any, out: Path, kept_ids: Sequence[int] | None) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with quiet():
            save_model(model, out)
            save_tokenizer(tokenizer, out)
        if kept_ids is not None:
            save_kept_ids(kept_ids, out)
    except OSError as error:
        raise RunError(
            f"the student cannot be written ({error})",
            where=out,
            fix="free some disk space, or choose a folder that can be written",
        ) from error
