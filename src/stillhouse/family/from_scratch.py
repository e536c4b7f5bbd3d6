"""Trains the largest member's shape from random weights, for comparison with that member."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stillhouse.evaluation.family_evaluation import ScratchTraining
from stillhouse.family.members import first_member
from stillhouse.language_model.data_stage import plan_data
from stillhouse.language_model.job import Job, find_models
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.train_stage import plan_student, plan_training
from stillhouse.language_model.training_memory import with_shard
from stillhouse.pipeline.stage_plan import Do
from stillhouse.runfolder import Stage
from stillhouse.students.student_config import RandomStudent
from stillhouse.training.checkpoints import METRICS, read_metrics

MEASUREMENTS = 12


def train_from_scratch(recipe: Recipe, job: Job, do: Do, largest: Path) -> ScratchTraining:
    """Train on `cascade.from_scratch.tokens` tokens from random weights, unless this is finished.

    job: the first member's job, once its data exists. largest: the checkpoint of the largest
    member, whose shape is used. Training uses all of the recipe's text, even beyond
    `data.train_tokens`, and starts over when the text ends.
    """
    assert recipe.cascade is not None
    section = recipe.cascade.from_scratch
    assert section is not None
    data = recipe.data.model_copy(update={"train_tokens": section.tokens})
    shape = str(largest.absolute())
    own = shape if job.folded else None
    random = RandomStudent(start="random", config=shape, tokenizer=own)
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
            "on_policy": None,
        }
    )
    changed = {"data": data, "student": random, "train": train, "signals": None, "quantize": None}
    first = first_member(recipe).model_copy(update=changed)
    # Use the family's teacher, whose vocabulary may have been cut, and its text.
    found = find_models(first, job.base, teacher=job.teacher)
    job = with_shard(replace(found, teachers=job.teachers, text=job.text, roots=job.roots))
    text = do(plan_data(job))
    student = do(plan_student(job, text))
    trained = do(replace(plan_training(job, text, student, None), name="scratch"))
    return ScratchTraining(_points(trained), trained.cost.flops, trained.cost.seconds)


def _points(trained: Stage) -> list[tuple[int, float]]:
    """Return each held-out KL with the tokens of the training row before it."""
    points = []
    tokens = 0.0
    for row in read_metrics(trained.path / METRICS):
        tokens = row.get("tokens", tokens)
        if "heldout_kl" in row:
            points.append((int(tokens), float(row["heldout_kl"])))
    return points
