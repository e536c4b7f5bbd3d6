"""What training each member from random weights would take, to the KL that it has.

The largest member's shape is trained from random weights under the same teacher for a while, a
power law is fitted to its held-out KL, and every member's KL is looked up on it. Beyond the tokens
that were trained on this is an extrapolation, and is called one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stillhouse import account
from stillhouse.evaluate.power_law import PowerLaw, fit_power_law
from stillhouse.family.members import first_member
from stillhouse.language_model.data_stage import plan_data
from stillhouse.language_model.job import Job, find_models, planned_size
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.train_stage import plan_student, plan_training
from stillhouse.pipeline.stage_plan import Do
from stillhouse.report.family_page import FromScratch, Member, ScratchMember
from stillhouse.runfolder import Stage
from stillhouse.students.student_config import RandomStudent
from stillhouse.teachers.load import load_config
from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.train import METRICS

MEASUREMENTS = 12


@dataclass(frozen=True)
class Curve:
    """law: of held-out KL. tokens: trained on. student, teacher: parameters that compute. rate:
    FLOPs a second of this training, measurements on the way included."""

    law: PowerLaw
    tokens: int
    student: int
    teacher: int
    rate: float


def measured_curve(recipe: Recipe, job: Job, do: Do, largest: Path) -> Curve:
    """Trains `cascade.from_scratch.tokens` tokens from random weights, or finds it done.

    job: the first member's, once its data are there.
    largest: the largest member's checkpoint, whose shape it has. The text is all of the recipe's,
    beyond `data.train_tokens`, and again from the start where it ends. Raises DataError where no
    curve can be fitted.
    """
    assert recipe.cascade is not None
    section = recipe.cascade.from_scratch
    assert section is not None
    data = recipe.data.model_copy(update={"train_tokens": section.tokens})
    random = RandomStudent(start="random", config=str(largest.absolute()))
    context, batch = recipe.data.context, recipe.train.batch_size
    steps = max(MEASUREMENTS, round(section.tokens / (context * batch)))
    train = recipe.train.model_copy(
        update={
            "learning_rate": section.learning_rate,
            "schedule": "constant",
            "max_steps": steps,
            "epochs": float(steps),
            "evaluate_every": max(1, steps // MEASUREMENTS),
            "early_stop": None,
        }
    )
    changed = {"data": data, "student": random, "train": train, "signals": None, "quantize": None}
    first = first_member(recipe).model_copy(update=changed)
    # The family's teacher, which may have lost tokens, and its text.
    found = find_models(first, job.base, teacher=job.teacher)
    job = replace(found, text=job.text)
    text = do(plan_data(job))
    student = do(plan_student(job, text))
    trained = do(replace(plan_training(job, text, student, None), name="scratch"))
    points = [
        (int(row["tokens"]), float(row["heldout_kl"]))
        for row in _with_tokens(trained)
        if "heldout_kl" in row
    ]
    size = planned_size(load_config(largest)).head_once
    asked = planned_size(load_config(job.teacher.path)).head_once
    rate = trained.cost.flops / trained.cost.seconds
    return Curve(fit_power_law(points), trained.cost.tokens, size, asked, rate)


def scratch_account(curve: Curve, members: Sequence[Member]) -> FromScratch:
    """Every member beside the same KL from random weights, by one curve for all sizes."""
    rows = []
    for member in members:
        reach = curve.law.reach(member.student.fidelity.kl)
        # A smaller member takes fewer FLOPs a token, in proportion.
        share = member.student.parameters / members[0].student.parameters
        a_token = account.distillation_flops(round(curve.student * share), curve.teacher, 1)
        rows.append(ScratchMember(member.name, **asdict(reach), flops_a_token=a_token))
    return FromScratch(
        members=rows,
        tokens=curve.tokens,
        points=curve.law.points,
        exponent=curve.law.exponent,
        scale=curve.law.scale,
        rate=curve.rate,
    )


def _with_tokens(trained: Stage) -> list[dict[str, float]]:
    """Measurements with the tokens of the training row before them."""
    rows = []
    tokens = 0.0
    for row in read_metrics(trained.path / METRICS):
        tokens = row.get("tokens", tokens)
        rows.append({**row, "tokens": tokens})
    return rows
