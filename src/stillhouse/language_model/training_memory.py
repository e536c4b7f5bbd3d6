"""The memory of a recipe's training on a machine, and the cheapest change that makes it fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from stillhouse.errors import RecipeError
from stillhouse.language_model.job import Job
from stillhouse.language_model.run_models import RunModels, run_models
from stillhouse.launch import leads, world_size
from stillhouse.planning.machine import Machine, micro_windows, this_machine
from stillhouse.planning.model_size import config_size
from stillhouse.planning.step_memory import MARGIN, Shard, Step, fitting_shard, training_memory
from stillhouse.planning.training_step import training_step
from stillhouse.processes import open_group
from stillhouse.progress import note
from stillhouse.signals.signals_config import SignalsRecipe
from stillhouse.training.train import Batching, plan_batches
from stillhouse.training.train_config import TrainRecipe

MOST_PROCESSES = 1024


def planned_training(
    models: RunModels, machine: Machine, windows: int
) -> tuple[Batching, Step, Shard]:
    """Plan the recipe's training on so many windows: its batches, a step, and what it shards.

    Raises RecipeError like `plan_batches`, and ModelError like `training_step`.
    """
    settings = models.recipe.train
    batching = _batching(models, machine, windows)
    weights = getattr(torch, settings.weights)
    step = training_step(
        models.student,
        models.live_teachers,
        windows=batching.micro,
        context=models.recipe.data.context,
        accumulates=batching.accumulation > 1,
        compute=machine.compute(settings.products),
        weights=weights,
        gathered=weights,  # products run under autocast, sharded or not
        device=machine.device,
        checkpointing=settings.gradient_checkpointing,
        freeze_head=settings.freeze_head,
        optimizer=settings.optimizer,
        offload=settings.offload_teacher and machine.device == "cuda",
        divergences=models.divergences,
        kept_layers=models.kept_layers,
    )
    return batching, step, _planned_shard(models, step, machine)


def sharing(settings: TrainRecipe, machine: Machine) -> int:
    """The number of processes that a model is sharded over."""
    return machine.per_node if settings.shard_within == "node" else machine.processes


def _planned_shard(models: RunModels, step: Step, machine: Machine) -> Shard:
    """Return what the recipe shards. For `auto`, that is the fastest choice that also fits in the
    stages that run the teacher alone. A student whose weights vLLM gets is not sharded."""
    over = sharing(models.recipe.train, machine)
    if (given := _given_shard(models.recipe.train, machine)) is not None:
        return given
    whole = models.recipe.train.hands_over_weights
    found = fitting_shard(
        step, machine.memory, over=over, processes=machine.processes, student=not whole
    )
    if found is None:
        return "teacher" if whole else "both"
    teacher = step.compute * config_size(models.teacher).parameters + step.context
    if teacher * (1 + MARGIN) <= machine.memory:
        return found
    return "both" if found in ("student", "both") else "teacher"


def run_shard(models: RunModels, machine: Machine) -> Shard:
    """Return what training shards. Raises StillhouseError like `planned_training`."""
    settings = models.recipe.train
    if (given := _given_shard(settings, machine)) is not None:
        return given
    return planned_training(models, machine, settings.batch_size)[2]


def _batching(models: RunModels, machine: Machine, windows: int) -> Batching:
    train, context = models.recipe.train, models.recipe.data.context
    most = micro_windows(machine.device, context, machine.compute(train.products))
    return plan_batches(train, windows, machine.processes, most_windows=most)


def _given_shard(settings: TrainRecipe, machine: Machine) -> Shard | None:
    """Return the sharding if it is known without a plan."""
    if sharing(settings, machine) == 1:
        return "none"
    return None if settings.shard == "auto" else settings.shard


def _fits(models: RunModels, machine: Machine, windows: int) -> bool:
    """Whether training on so many windows fits; False if the batch cannot be divided this way."""
    try:
        _, step, shard = planned_training(models, machine, windows)
    except RecipeError:
        return False
    over = sharing(models.recipe.train, machine)
    memory = training_memory(step, shard, over=over, processes=machine.processes)
    return memory.fits(machine.memory)


def cheapest_change(models: RunModels, machine: Machine, windows: int) -> str:
    """Find the recipe change with which training fits and stays fastest."""
    for changes in _changes(models, machine):
        if _fits(_changed(models, changes), machine, windows):
            return f"set {_written(changes)}"
    return _more_processes(models, machine, windows)


def _changes(models: RunModels, machine: Machine) -> Iterator[dict[str, Any]]:
    """Yield changes, starting with the one that costs the least time, and finally all together."""
    settings = models.recipe.train
    micro = _batching(models, machine, 1).micro
    smaller = [{"train.micro_batch_size": micro >> n} for n in range(1, micro.bit_length())]
    others: list[dict[str, Any]] = []
    if machine.processes > 1 and settings.shard != "auto":
        others.append({"train.shard": "auto"})
    if not settings.gradient_checkpointing:
        others.append({"train.gradient_checkpointing": True})
    live = models.live_teachers
    several = machine.device == "cuda" and machine.processes > 1
    if live and several and not settings.offload_teacher:
        others.append({"train.offload_teacher": True})
    if live and not settings.teachers:
        others.append({"signals": {}})
    if settings.optimizer != "adamw_8bit":
        others.append({"train.optimizer": "adamw_8bit"})
    yield from smaller
    yield from others
    together = dict(smaller[-1]) if smaller else {}
    for change in others:
        together |= change
        yield dict(together)


def _changed(models: RunModels, changes: Mapping[str, Any]) -> RunModels:
    recipe = models.recipe
    train = {key.removeprefix("train."): new for key, new in changes.items() if "." in key}
    update: dict[str, Any] = {"train": recipe.train.model_copy(update=train)}
    if "signals" in changes:
        update["signals"] = SignalsRecipe()
    return replace(models, recipe=recipe.model_copy(update=update))


def _more_processes(models: RunModels, machine: Machine, windows: int) -> str:
    """Find how many GPUs of this size would be enough, with all changes."""
    *_, together = [{}, *_changes(models, machine)]
    changed = _changed(models, together)
    larger = machine
    while machine.device == "cuda" and larger.processes < MOST_PROCESSES:
        larger = replace(larger, nodes=2 * larger.nodes)
        if _fits(changed, larger, windows):
            also = f", with {_written(together)}" if together else ""
            return f"use {larger.processes} GPUs{also}"
    return "use a smaller student or teacher, or a smaller data.context"


def _written(changes: Mapping[str, Any]) -> str:
    return " and ".join(f"{key}: {json.dumps(new)}" for key, new in changes.items())


def is_small(models: RunModels, machine: Machine) -> bool:
    """Whether a generous bound fits many times over, so that nothing needs to be traced."""
    recipe = models.recipe
    tokens = recipe.data.context * (recipe.train.micro_batch_size or recipe.train.batch_size)
    sizes = [config_size(each) for each in (models.student, models.teacher, *models.teachers)]
    values = sum(one.parameters + tokens * (one.hidden * one.layers + 16) for one in sizes)
    values += 4096 * max(one.vocabulary for one in sizes)
    return 1000.0 * values < machine.memory


def with_shard(job: Job) -> Job:
    """Replace `train.shard: auto` with the fastest choice that fits here.

    Every process of a torchrun must call this; the main process chooses for all.
    """
    train = job.recipe.train
    if world_size() == 1 or train.shard != "auto":
        return job
    open_group()
    chosen: list[Shard | None] = [_chosen_shard(job) if leads() else None]
    dist.broadcast_object_list(chosen)
    settings = train.model_copy(update={"shard": chosen[0]})
    return replace(job, recipe=job.recipe.model_copy(update={"train": settings}))


def _chosen_shard(job: Job) -> Shard:
    models, train = run_models(job), job.recipe.train
    machine = this_machine(train.products, timed=False)
    if is_small(models, machine):
        return "none"
    chosen = run_shard(models, machine)
    if chosen != "none":
        note(f"train.shard: using {chosen}, because the models do not fit into every process")
    return chosen
