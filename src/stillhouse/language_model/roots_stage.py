"""The stage that builds the roots through which teachers with different tokenizers teach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job
from stillhouse.pipeline.stage_plan import Do
from stillhouse.progress import note
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.aligned_text import (
    MERGED_FROM_TOKENS,
    Alignment,
    observed,
    require_readable,
)
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.roots import Roots, merged
from stillhouse.teachers.roots_file import cached_roots, load_roots, save_roots


def has_other_tokenizers(job: Job) -> bool:
    return job.after_cut is None and bool(job.other_teachers)


def plan_roots(job: Job, data: Stage) -> StagePlan:
    """Plan a folder of roots for each teacher with a different tokenizer. The training text decides
    which roots are merged."""

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        found = {}
        for source in job.other_teachers:
            aligner = aligner_of(job.tokenizer, source)
            for text in (windows, heldout):
                require_readable(aligner, text)
            pairs = observed(aligner, windows, MERGED_FROM_TOKENS)
            if not pairs:
                raise DataError(
                    "the teacher teaches nothing: no supervised token of the text starts where one "
                    "of its tokens does",
                    where=source.described,
                    fix="choose a teacher whose tokenizer can encode this text, or one from the "
                    "student's model family",
                )
            roots = merged(cached_roots(aligner), pairs)
            folder = out / _name(source)
            folder.mkdir()
            save_roots(roots, folder, aligner)
            note(
                f"{source.described}: {roots.shared:,} strings are tokens of both tokenizers, and "
                f"{len(roots.merges):,} pairs of tokens were merged"
            )
            found[_name(source)] = {"shared": roots.shared, "merged": len(roots.merges)}
        return Outcome(summary=found)

    inputs: dict[str, Any] = {
        "tokenizer": job.tokenizer.fingerprint,
        "teachers": [source.fingerprint for source in job.other_teachers],
        "data": data.digest,
    }
    return StagePlan("roots", inputs, work)


def with_roots(job: Job, stages: Mapping[str, Stage], _do: Do) -> Job:
    return replace(job, roots=stages["roots"])


def roots_key(job: Job) -> dict[str, str]:
    """Return the key that identifies the run's roots; empty if all tokenizers are the same."""
    return {} if job.roots is None else {"roots": job.roots.digest}


def run_roots(job: Job, source: ModelSource) -> Roots | None:
    """Load the run's roots for a teacher; None if it has none. Raises ModelError if the file is
    damaged."""
    if job.roots is None or source not in job.other_teachers:
        return None
    return load_roots(job.roots.path / _name(source), aligner_of(job.tokenizer, source))


def teacher_alignment(job: Job) -> Alignment | None:
    """Return the alignment for comparing the student with the recipe's teacher; None if both have
    the same tokens."""
    if not job.folded:
        return None
    aligner, roots = aligner_of(job.tokenizer, job.teacher), run_roots(job, job.teacher)
    return Alignment(aligner, roots or cached_roots(aligner))


@lru_cache(maxsize=4)
def aligner_of(own: ModelSource, other: ModelSource) -> TokenAligner:
    return TokenAligner(load_tokenizer(own), load_tokenizer(other))


def _name(source: ModelSource) -> str:
    """The name of a teacher's folder in the stage."""
    return source.fingerprint[:16]
