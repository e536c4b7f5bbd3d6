"""The stage that generates a run's text: a teacher answers prompts, and `data` reads the answers.

Its key covers everything that determines the text: the requests' fields, the contents of the files
that are read, and the section's filters. The answers are in the journal, which all runs share, so a
stage that was killed or reruns with a different filter never pays twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse import account
from stillhouse.atomic_files import complete_or_absent, flush, write_atomically
from stillhouse.checksums import sha
from stillhouse.data.data_files import regular, regular_if_there
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import DataError, RunError
from stillhouse.generation.helpers import help_main_process, helpers_of
from stillhouse.generation.text_teacher import DefaultModel, LocalText, answers_of, any_runs_here
from stillhouse.language_model.job import Job
from stillhouse.language_model.recipe import Recipe
from stillhouse.launch import leads
from stillhouse.pipeline.stage_plan import Do
from stillhouse.planning.model_size import config_size
from stillhouse.progress import note
from stillhouse.runfolder import Outcome, RunFolder, Stage, StagePlan, answers_path, run_root
from stillhouse.shared_work import ALONE, all_processes
from stillhouse.synthesis.filters import DROPPED
from stillhouse.synthesis.synthesis_job import SynthesisJob
from stillhouse.synthesis.synthesize import TEXT, Synthesis, synthesize
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from stillhouse.synthesis.synthesized_text import SynthesizedText, reads
from stillhouse.teachers.load_model import load_config

NAME = "synthesis"
"""The name of the stage and of the link to it in the run folder."""
PUBLISHED = ".published"
"""A file in the run folder with the SHA-256 of every text that was copied to `synthesize.out`, one
per line."""


def synthesis_job(recipe: Recipe, base: Path) -> SynthesisJob:
    section, teacher = recipe.synthesize, recipe.teacher
    assert section is not None
    journal = base / section.journal if section.journal else answers_path(recipe)
    model = DefaultModel(base, teacher.model, teacher.revision, teacher.trust_remote_code)
    return SynthesisJob(section, model, journal, recipe.seed)


def out_path(section: SynthesizeRecipe, base: Path) -> Path:
    """Return the path that the text is copied to. Raises RunError if something other than a file is
    there."""
    path = (base / section.out).absolute()
    if path.exists() and not path.is_file():
        raise RunError(
            "the synthesized text cannot be written here: there is a folder or a device",
            where=path,
            fix="move it out of the way, or set synthesize.out to the path of a file",
        )
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise RunError(
            "the synthesized text cannot be written here: there is a file where a folder should be",
            where=parent,
            fix="move it out of the way, or set synthesize.out to a different path",
        )
    return regular_if_there(path)


def makes_text(recipe: Recipe, base: Path) -> bool:
    """Whether a run synthesizes its text, because a data source names `synthesize.out`."""
    section = recipe.synthesize
    return section is not None and reads(recipe.data, out_path(section, base), base)


def require_text(recipe: Recipe, base: Path) -> None:
    """Raise DataError if the run's text is not synthesized yet, because that can cost money."""
    if makes_text(recipe, base) and finished_text(recipe, base) is None:
        raise DataError(
            "this recipe's text is not synthesized yet",
            where=out_path(recipe.synthesize, base) if recipe.synthesize else None,
            fix="run `stillhouse synthesize RECIPE` first",
        )


def finished_text(recipe: Recipe, base: Path) -> Stage | None:
    """Return the finished synthesis stage in the recipe's run folder."""
    return RunFolder(run_root(recipe)).finished(synthesis_plan(recipe, base))


def synthesis_plan(recipe: Recipe, base: Path) -> StagePlan:
    """Plan the synthesis stage. Raises DataError if a file that the section names is missing."""
    job = synthesis_job(recipe, base)
    section, teacher, judge = job.section, job.teacher(), job.judge()
    sources = [source for source in (teacher, judge and judge.teacher) if source]
    runs_here = any_runs_here(*sources)

    def work(out: Path) -> Outcome:
        processes = all_processes() if runs_here else ALONE
        if not processes.leads:
            help_main_process(processes, answers_of)
            return Outcome()
        with helpers_of(processes) as helpers:
            helped = replace(job, default=replace(job.default, helpers=helpers))
            made = synthesize(helped, out)
        flops = 0
        if isinstance(teacher, LocalText):
            size = config_size(load_config(teacher.source))
            flops = account.forward_flops(size.active, made.tokens)
        summary = {**made.facts(), "sha256": sha(out / TEXT)}
        return Outcome(tokens=made.tokens, flops=flops, summary=summary)

    requests = [source.request(()) for source in sources]
    plain = {"teacher": True, "sampling": True, "journal": True, "out": True}
    rules: dict[str, Any] = {**plain, "filters": {"best_of": {"teacher"}}}
    inputs = {
        "recipe": section.model_dump(mode="json", exclude=rules),
        "asked": [[one.endpoint, one.model, dict(one.parameters)] for one in requests],
        "seed": None if section.prompts.combine is None else recipe.seed,
        "files": {key: _content(base, key, path) for key, path in input_files(section).items()},
    }
    return StagePlan(NAME, inputs, work, version=5, together=runs_here)


def with_text(job: Job, stages: Mapping[str, Stage], _do: Do) -> Job:
    """Return the job that reads this run's text."""
    assert job.recipe.synthesize is not None
    stage, out = stages[NAME], out_path(job.recipe.synthesize, job.base)
    if leads():
        publish(stage.path / TEXT, out, job.recipe)
        missing = missing_answers(stage)
        if missing and stage.reused:
            note(f"{missing:,} requests have no answer: resend them with `stillhouse synthesize`")
    return replace(job, text=SynthesizedText(out, stage.path / TEXT, stage.summary["sha256"]))


def missing_answers(stage: Stage) -> int:
    """The number of requests to the teacher or the judge that have no answer."""
    facts = stage.summary
    return facts["requests"] - facts["answered"] + facts["unjudged"]


def complete_text(recipe: Recipe, base: Path, folder: RunFolder, do: Do) -> Synthesis:
    """Run the stage for `stillhouse synthesize`, again if some requests have no answer."""
    section = recipe.synthesize
    assert section is not None
    out = out_path(section, base)
    folder.require_free(NAME)
    stage = do(replace(synthesis_plan(recipe, base), missing=missing_answers))
    folder.point(NAME, stage.path)
    out = publish(stage.path / TEXT, out, recipe)
    facts = {key: value for key, value in stage.summary.items() if key != "sha256"}
    if stage.reused:
        facts |= {"new": 0, "failed": 0}
    journal = synthesis_job(recipe, base).journal
    return Synthesis(out, stage.path / DROPPED, journal, **facts)


def follow_text(recipe: Recipe, base: Path, do: Do) -> None:
    """Do the work of a torchrun's other processes in `stillhouse synthesize`."""
    do(replace(synthesis_plan(recipe, base), missing=missing_answers))


def publish(text: Path, out: Path, recipe: Recipe) -> Path:
    """Copy the text to the recipe's `out` atomically, so that a failed copy leaves the old file.

    A file that this recipe did not write is also kept, with a note. Returns the path of the text,
    which is `out` if it was copied. Raises RunError for disk errors.
    """
    if out.is_file() and sha(out) == sha(text):
        return out
    if not may_replace(out, recipe):
        note(
            f"{out} was not written by this recipe, so it is not replaced, and the run reads "
            f"{text} instead; to train on a file that you edited, give it a different name"
        )
        return text
    record = run_root(recipe) / PUBLISHED
    write_atomically(record, f"{_published(record)}{sha(text)}\n")
    with disk_errors(out, elsewhere="set synthesize.out to a writable path"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(out) as temporary:
            shutil.copyfile(text, temporary)
            flush(temporary)
    return out


def may_replace(out: Path, recipe: Recipe) -> bool:
    """Whether the file is missing or was written by this recipe."""
    if not out.exists():
        return True
    return out.is_file() and sha(out) in _published(run_root(recipe) / PUBLISHED).split()


def _published(record: Path) -> str:
    """The hashes of what a recipe wrote to its `out`, one per line."""
    return record.read_text(encoding="utf-8", errors="replace") if record.is_file() else ""


def input_files(section: SynthesizeRecipe) -> dict[str, str]:
    """The input files, by the section's keys that name them."""
    filters, exam = section.filters, section.filters.decontaminate
    files = {
        "prompts.path": section.prompts.path,
        "filters.json_schema": filters.json_schema,
        "filters.decontaminate.path": None if exam is None else exam.path,
    }
    return {key: path for key, path in files.items() if path is not None}


def _content(base: Path, key: str, path: str) -> str:
    file = base / path
    try:
        return sha(regular(file))
    except OSError as error:
        kind = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise DataError(
            f"the file of synthesize.{key} {kind}",
            where=file,
            fix="check the path, which is relative to the recipe's folder",
        ) from None
