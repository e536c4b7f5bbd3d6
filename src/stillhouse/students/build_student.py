"""Building of the initial student: a float32 checkpoint with a tokenizer, before any training. Its
configuration is planned first, for estimates and to reject impossible sizes early."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stillhouse.account import count_parameters
from stillhouse.data.windows import WindowSet
from stillhouse.pruning.offload import load_offloaded
from stillhouse.pruning.prune import check_importance
from stillhouse.pruning.shapes import planned_shape
from stillhouse.pruning.sizes import Sizes, check_sizes, resized_config, sizes_of
from stillhouse.pruning.surgery import check_saved
from stillhouse.pruning.vocabulary_cut import save_kept_ids
from stillhouse.shared_work import ALONE, Processes
from stillhouse.students.pruned_student import Summary, explicit_sizes, prune_to
from stillhouse.students.random_student import (
    for_tokenizer,
    overridden_config,
    random_model,
    require_rows,
)
from stillhouse.students.student import Student
from stillhouse.students.student_config import PretrainedStudent, PrunedStudent, RandomStudent
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import (
    ModelSource,
    resolve_config,
    resolve_model,
    resolve_tokenizer,
)
from stillhouse.teachers.shared_vocabulary import token_count
from stillhouse.teachers.source_tokenizers import shared_vocabulary

CHECKED_TOKENS = 64
"""Number of tokens on which the saved student must reproduce the logits of the one in memory."""


def build_student(
    section: PretrainedStudent | RandomStudent | PrunedStudent,
    *,
    teacher: ModelSource,
    windows: WindowSet,
    seed: int,
    base: Path,
    out: Path,
    heldout: WindowSet | None = None,
    processes: Processes = ALONE,
    same_tokens: bool = True,
) -> Summary:
    """Build the student that `section` describes, save it in `out`, and return a summary.

    windows: the training text, which only a pruned student uses. heldout: compared only with the
    training text; a note warns if the domains differ, with the measured KL. base: the folder that
    paths in the recipe are relative to. processes: processes that prune together; only the main
    process writes. same_tokens: whether a pretrained student must have the teacher's tokens.

    The summary is plain data for JSON: start, parameters (total, non_embedding, active), notes, and
    for a pruned student `pruning` (see pruning.PruneReport), the teacher's parameters, and `flops`.
    A student with fewer tokens than its teacher gets a new tokenizer, and a file with the map to
    the teacher's ids (see pruning.kept_token_ids).
    Raises ModelError, RecipeError, DataError as its parts do. RunError if `out` is not writable.
    """
    kept_ids: tuple[int, ...] | None = None
    match section:
        case PretrainedStudent():
            student, summary = _pretrained(section, teacher, base, same_tokens=same_tokens)
        case RandomStudent():
            student, summary = _random(section, teacher, seed, base)
        case PrunedStudent():
            model = load_offloaded(teacher)
            tokenizer, summary, kept_ids = prune_to(
                section,
                model,
                load_tokenizer(teacher),
                windows,
                heldout,
                seed=seed,
                base=base,
                processes=processes,
            )
            student = Student(model, tokenizer)
    if not processes.leads:
        return summary
    student.save(out, every_row=True)
    if kept_ids is not None:
        save_kept_ids(kept_ids, out)
    if not teacher.trusted and not getattr(section, "trust_remote_code", False):
        ids_RL = torch.arange(min(CHECKED_TOKENS, student.vocabulary))[None]
        check_saved(student.model, out, ids_RL)
    parameters = asdict(count_parameters(student.model))
    return {"start": section.start, "parameters": parameters, **summary}


def _pretrained(
    section: PretrainedStudent, teacher: ModelSource, base: Path, *, same_tokens: bool
) -> tuple[Student, Summary]:
    source = resolve_model(
        section.model, revision=section.revision, base=base, trusted=section.trust_remote_code
    )
    student = Student.load(source)
    found: Summary = {"model": source.described, "fingerprint": source.fingerprint}
    if not same_tokens:
        return student, {**found, "notes": []}
    match = shared_vocabulary(teacher, source)
    return student, {**found, "vocabulary": asdict(match), "notes": list(match.warnings)}


def _random(
    section: RandomStudent, teacher: ModelSource, seed: int, base: Path
) -> tuple[Student, Summary]:
    named = section.tokenizer and resolve_tokenizer(
        section.tokenizer, base=base, trusted=teacher.trusted
    )
    tokenizer = load_tokenizer(named or teacher)
    config = start_config(section, load_config(teacher), base)
    if named or section.config is not None:
        config = for_tokenizer(config, tokenizer)
    overrides = {"vocab_size": token_count(tokenizer), **section.overrides}
    config = overridden_config(config, overrides)
    require_rows(config, tokenizer)
    student = Student(random_model(config, seed), tokenizer)
    return student, {"overrides": dict(section.overrides), "notes": []}


def start_config(section: RandomStudent, teacher_config: Any, base: Path) -> Any:
    """The configuration that a random student's overrides start from: `section.config`, or the
    teacher's."""
    if section.config is None:
        return teacher_config
    return load_config(resolve_config(section.config, base=base))


def config_sha256(section: RandomStudent, base: Path) -> str | None:
    """The SHA-256 of `section.config`; None if the teacher's configuration is used."""
    if section.config is None:
        return None
    file = resolve_config(section.config, base=base) / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def planned_config(
    section: PrunedStudent | RandomStudent,
    teacher_config: Any,
    base: Path,
    *,
    served: torch.dtype = torch.bfloat16,
    owner: str | None = None,
    tokenizer: ModelSource | None = None,
) -> Any:
    """A configuration with the student's sizes.

    It is not known yet which layers a pruned student keeps, nor how many tokens `vocabulary: data`
    keeps; all tokens are counted.
    served: the dtype of the exported weights, for a target in bytes. owner: the pruned model's name
    in error messages; None: as in the section. tokenizer: a random student's, if it is not the
    teacher's.
    Raises RecipeError if the sizes are impossible; for a target, only if that is certain.
    """
    if isinstance(section, RandomStudent):
        config = start_config(section, teacher_config, base)
        if tokenizer is not None:
            config = for_tokenizer(config, load_tokenizer(tokenizer))
        return overridden_config(config, section.overrides)
    if section.target is None:
        after = explicit_sizes(section, teacher_config, owner=owner)
        check_importance(section, sizes_of(teacher_config), after)
    else:
        after = _searched_sizes(section, teacher_config, served)
    return resized_config(teacher_config, after, rotated=section.hidden_method == "rotation")


def _searched_sizes(section: PrunedStudent, config: Any, served: torch.dtype) -> Sizes:
    """Sizes of the shape that meets the target with the fewest cuts. The search finds the best
    shape."""
    assert section.target is not None
    before, axes = sizes_of(config), section.search.axes
    # Everything that the search can cut must be ranked, whichever shape it will choose.
    cut = {key: 0 for key in ("ffn_size", "experts") if key in axes}
    check_importance(section, before, replace(before, **cut))
    vocabulary = section.vocabulary
    if isinstance(vocabulary, int):
        # The search prunes the model without the removed tokens.
        config = resized_config(config, check_sizes(config, {"vocabulary": vocabulary}))
    return planned_shape(
        config,
        section.search,
        section.target,
        width=served.itemsize,
        certain=vocabulary is None or isinstance(vocabulary, int),
    )
