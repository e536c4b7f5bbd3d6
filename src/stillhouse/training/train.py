"""Training of a student with a teacher, resumable at any time if a folder is given."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stillhouse import account
from stillhouse.data.batches import Batches
from stillhouse.errors import RecipeError, TrainingError
from stillhouse.hardware import choose_precision, default_device, peak_memory_bytes
from stillhouse.launch import leads, process_index, world_size
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.planning.machine import micro_windows
from stillhouse.processes import leave_group, lost_process, open_group, shards_in_node
from stillhouse.progress import bar, note
from stillhouse.scratch import temporary_folder
from stillhouse.students.student import Student
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.checkpoints import CHECKPOINTS, METRICS, Meter, Metrics
from stillhouse.training.draw_rollouts import rollout_generator
from stillhouse.training.muon import chosen_optimizer
from stillhouse.training.on_policy import OnPolicy
from stillhouse.training.own_prompts import OwnPrompts
from stillhouse.training.resuming import Housekeeping, step_arguments, train_from_newest
from stillhouse.training.save_trained import save_trained
from stillhouse.training.step_rows import Micro
from stillhouse.training.train_config import TrainRecipe
from stillhouse.training.trainer import DistillationTrainer

MODEL = "model"


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    tokens: number of supervised tokens. own_tokens: how many of these the student generated.
    seconds: without held-out evaluation. metrics: the logged rows, one per logged step. Their keys
    are the objective's terms, `heldout_` metrics, and `own_` metrics of text that the student
    generated.
    """

    steps: int
    planned_steps: int
    tokens: int
    seconds: float
    flops: int
    peak_memory_bytes: int
    precision: str
    metrics: Sequence[Mapping[str, float]] = ()
    own_tokens: int = 0

    def summary(self) -> dict[str, Any]:
        """All fields except the metrics, as plain values for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metrics"}

    def __repr__(self) -> str:
        losses = [row["loss"] for row in self.metrics if "loss" in row]
        found = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""
        measured = [row for row in self.metrics if "heldout_perplexity" in row]
        for name in measured[-1] if measured else ():
            found += f", {name} {measured[-1][name]:.4g}" if name.startswith("heldout_") else ""
        return (
            f"TrainingResult({self.steps:,} of {self.planned_steps:,} steps, {self.tokens:,} "
            f"tokens in {self.seconds:,.1f} s{found})"
        )


@dataclass(frozen=True)
class Batching:
    """The division of an optimizer step's windows. batch = micro x accumulation x processes."""

    micro: int
    accumulation: int
    processes: int
    steps: int


def shards(settings: TrainRecipe, model: Literal["student", "teacher"]) -> int:
    """The number of processes that this model is sharded over; 1: each has a copy."""
    if settings.shard not in (model, "both"):
        return 1
    return shards_in_node(settings.shard_within == "node")


def plan_batches(
    section: TrainRecipe, windows: int, processes: int, *, most_windows: int | None = None
) -> Batching:
    """Plan the steps and micro-batches for this number of windows.

    most_windows: maximum size of the default micro-batch (see `micro_windows`); None: the process's
    share of the batch. Raises RecipeError if the batch cannot be split evenly.
    """
    micro = section.micro_batch_size or max(1, section.batch_size // processes)
    if section.micro_batch_size is None and most_windows is not None:
        micro = max(n for n in range(1, min(micro, most_windows) + 1) if micro % n == 0)
    if section.batch_size % (micro * processes):
        raise RecipeError(
            f"train.batch_size {section.batch_size} is not a multiple of micro_batch_size {micro} "
            f"x {processes} processes",
            where="train.batch_size",
            fix=f"use a multiple of {micro * processes}",
        )
    accumulation = section.batch_size // (micro * processes)
    micro_batches = math.ceil(windows / (micro * processes))
    steps_an_epoch = math.ceil(micro_batches / accumulation)
    steps = math.ceil(section.epochs * steps_an_epoch)
    if section.max_steps is not None:
        steps = min(steps, section.max_steps) if windows else section.max_steps
    return Batching(micro, accumulation, processes, steps)


def train(
    student: Student,
    teacher: Teacher | None,
    batches: Batches,
    objective: ObjectiveRecipe,
    settings: TrainRecipe,
    *,
    heldout: Batches | None = None,
    seed: int = 0,
    folder: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    prompts: OwnPrompts | None = None,
    base: Path = Path(),
) -> TrainingResult:
    """Train the student in place. Its weights get the dtype `settings.weights`.

    teacher: None if no term needs one. heldout: evaluated every `settings.evaluate_every` steps.
    callbacks: additional transformers callbacks, whose `model` is a `Distillation`.
    prompts: for `settings.on_policy`; None: the chats in `batches`, without their last answer.
    base: the folder that paths in `settings.on_policy` are relative to.
    folder: for `model` (a plain Hugging Face folder), `metrics.jsonl`, and `checkpoints`. A killed
    run resumes from the newest checkpoint that can be loaded, and ends with the same weights as an
    uninterrupted run. None: nothing is written.
    Under torchrun or accelerate launch, every process must call this.
    Raises RecipeError, SignalError, ModelError: settings and models that do not fit together.
    TrainingError: no text to train or evaluate on, a loss that is not finite, or weights that were
    not saved. DeviceError: processes with different devices.
    """
    device = default_device()
    precision = choose_precision(settings.products, device)
    most = micro_windows(device.type, batches.context, precision.dtype)
    plan = plan_batches(settings, len(batches), world_size(), most_windows=most)
    if plan.processes > 1 and not settings.only_own_text:
        require_windows(len(batches), plan.processes)
    with lost_process(plan.processes):
        open_group()
    student.cut_rows_without_tokens()
    _check_text(batches, heldout, settings)
    if leads():
        note(f"precision: {precision.reason}")
    # Only the main process writes, since other processes' files would become part of the stage.
    file = folder / METRICS if folder is not None and leads() else None
    step_tokens = settings.batch_size * batches.context
    shown = 0
    begin_again: Callable[[], None] | None = None

    def make(meter: Meter) -> DistillationTrainer:
        nonlocal shown, begin_again
        if begin_again is not None:
            begin_again()
        elif meter.step:
            begin_again = student.remember()  # a checkpoint that fails to load can change weights
        student.trainable(freeze_head=settings.freeze_head, dtype=getattr(torch, settings.weights))
        own = None
        if settings.on_policy is not None and settings.on_policy.share > 0:
            own = OnPolicy(
                settings.on_policy,
                prompts,
                batches,
                batch=settings.batch_size,
                steps=plan.steps,
                micro=Micro(plan.micro, process_index(), plan.processes),
                generator=generator,
                seed=seed,
                folder=folder,
            )
        accumulation = plan.accumulation if own is None else own.micro.most_batches(own.plan)
        arguments = _arguments(
            settings, plan, accumulation, written, precision.dtype, seed, folder is not None
        )
        advance(meter.step * step_tokens - shown)
        shown = meter.step * step_tokens
        trainer = DistillationTrainer(
            student,
            teacher,
            objective,
            metrics=Metrics(file, keep_to_step=meter.step),
            meter=meter,
            early_stop=settings.early_stop,
            shards=shards(settings, "student"),
            own=own,
            args=arguments,
            train_dataset=batches,
            eval_dataset=heldout,
            optimizer_cls_and_kwargs=chosen_optimizer(settings, precision.dtype, seed),
        )
        trainer.remove_callback(PrinterCallback)
        keep = Housekeeping(trainer, settings.keep_checkpoints, partial(advance, step_tokens))
        for callback in (keep, *callbacks):
            trainer.add_callback(callback)
        return trainer

    with (
        lost_process(plan.processes),
        bar("train", total=plan.steps * step_tokens) as advance,
        _checkpoint_folder(folder) as written,
        rollout_generator(
            settings.on_policy,
            precision.dtype,
            student.checkpoint(written),
            base=base,
            seed=seed,
        ) as generator,
    ):
        with _as_it_came(student):  # restore the configuration before it is saved
            trainer = train_from_newest(written, make, steps=plan.steps)
        done = trainer.meter()
        student.changed = True
        if folder is not None:
            save_trained(trainer, student, folder / MODEL)
    if plan.processes > 1:
        with lost_process(plan.processes):
            trainer.accelerator.wait_for_everyone()
        atexit.register(leave_group)
    size = account.count_parameters(student.model).active
    return TrainingResult(
        steps=done.step,
        planned_steps=plan.steps,
        tokens=done.tokens,
        own_tokens=done.own_tokens,
        seconds=done.seconds,
        flops=account.training_flops(size, done.tokens)
        + account.forward_flops(size, done.processed_tokens)
        + (0 if teacher is None else teacher.flops(done.tokens - done.own_tokens))
        + (0 if trainer.own is None else trainer.own.teacher.flops(done.own_tokens)),
        peak_memory_bytes=peak_memory_bytes(),
        precision=precision.reason,
        metrics=trainer.metrics.rows,
    )


def require_windows(windows: int, processes: int, *, at_most: bool = False) -> None:
    """Raise RecipeError if there are more processes than windows. at_most: `windows` is an upper
    bound."""
    if windows < processes:
        raise RecipeError(
            f"{processes} processes cannot share {'at most ' if at_most else ''}{windows:,} "
            f"window{'s' * (windows != 1)}",
            where="data",
            fix=f"use at most {windows:,} process{'es' * (windows != 1)}, more text, or a smaller "
            "data.context",
        )


def _check_text(batches: Batches, heldout: Batches | None, settings: TrainRecipe) -> None:
    if batches.supervised_tokens == 0 and not settings.only_own_text:
        raise TrainingError(
            "the training data has no supervised tokens",
            where=getattr(batches, "path", None),
            fix="use data with answers or text to learn from, or set train.on_policy.share to 1",
        )
    if heldout is None and settings.evaluate_every is not None:
        raise TrainingError(
            "there is no held-out text to evaluate on",
            where="train.evaluate_every",
            fix="add held-out text, or remove evaluate_every",
        )


@contextmanager
def _checkpoint_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder / CHECKPOINTS
        return
    with temporary_folder("stillhouse-") as scratch:
        yield Path(scratch)  # transformers requires a folder, and writes nothing there


@contextmanager
def _as_it_came(student: Student) -> Iterator[None]:
    """After the block, restore the student model's attention and cache, and put it in eval mode."""
    config = student.model.config
    attention, use_cache = config._attn_implementation, config.use_cache
    try:
        yield
    finally:
        student.model.set_attn_implementation(attention)
        student.model.config.use_cache = use_cache
        student.model.eval()


def _arguments(
    section: TrainRecipe,
    plan: Batching,
    accumulation: int,
    folder: Path,
    dtype: torch.dtype,
    seed: int,
    save: bool,
) -> TrainingArguments:
    device = default_device()
    common = step_arguments(
        section, folder, steps=plan.steps, rows=plan.micro, dtype=dtype, seed=seed
    )
    scheduler_kwargs: dict[str, Any] = {}
    if section.schedule == "wsd":
        # Rounding can make warmup and decay one step too long in total.
        most = plan.steps - common["warmup_steps"]
        scheduler_kwargs["num_decay_steps"] = max(1, min(round(section.decay * plan.steps), most))
    every = section.evaluate_every
    own = {
        "per_device_eval_batch_size": plan.micro,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_kwargs": scheduler_kwargs,
        "adam_beta1": section.betas[0],
        "adam_beta2": section.betas[1],
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if device.type == "cpu" and plan.processes > 1 else None,
        "logging_steps": max(1, plan.steps // 500),
        "save_strategy": "steps" if save else "no",
        "eval_strategy": "no" if every is None else "steps",
        "eval_steps": every,
        "report_to": section.report_to or "none",
        "average_tokens_across_devices": True,
        checkpointing_key(): section.gradient_checkpointing,
    }
    return TrainingArguments(**{**common, **own})


def checkpointing_key(arguments: Any = TrainingArguments) -> str:
    """The name of the option for activation checkpointing, which was renamed in transformers
    5.23."""
    known = {field.name for field in fields(arguments)}
    new = "activation_checkpointing"
    return new if new in known else "gradient_checkpointing"
