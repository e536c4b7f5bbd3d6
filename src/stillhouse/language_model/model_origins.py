"""The models that a run's student is made from, whose licenses apply to it."""

from __future__ import annotations

from pathlib import Path

from stillhouse.export.licenses import TEACHER, Origin, api_origin, distinct, origin
from stillhouse.generation.request import api_described
from stillhouse.language_model.job import Job
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.synthesis_stage import makes_text
from stillhouse.runfolder import run_root
from stillhouse.teachers.model_source import resolve_model


def origins_of(job: Job) -> list[Origin]:
    """Return the origins: the teacher first, then the student's start and the other teachers.

    A model built by the run itself, such as a cascade's previous student, is left out: its origins
    are among the first student's.
    """
    started = [("The student's start", one) for one in (job.pretrained, job.pruned) if one]
    teachers = [("Another teacher", teacher) for teacher in job.teachers]
    here = run_root(job.recipe).resolve()
    others = [(part, one) for part, one in started + teachers if not one.path.is_relative_to(here)]
    return distinct(
        [
            origin(TEACHER, job.teacher, job.recipe.teacher.license),
            *(origin(part, source) for part, source in others),
            *_of_text(job.recipe, job.base),
        ]
    )


def _of_text(recipe: Recipe, base: Path) -> list[Origin]:
    """Return the model that generates the text, if it is not the teacher."""
    if not makes_text(recipe, base):
        return []
    assert recipe.synthesize is not None
    teacher, part = recipe.synthesize.teacher, "The text's teacher"
    if teacher.api is not None:
        return [api_origin(part, api_described(teacher.api))]
    here = teacher.here
    if here is None or here.model is None:
        return []
    found = resolve_model(here.model, revision=here.revision, base=base, weights=False)
    return [origin(part, found)]
