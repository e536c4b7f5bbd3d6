"""Trains one student: from checkpoints on disk to a checkpoint on disk, resumable at any moment."""

from __future__ import annotations

import atexit
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stillhouse import account
from stillhouse.data.windows import Windows, collate
from stillhouse.errors import ModelError, RecipeError, TrainingError
from stillhouse.hardware import (
    choose_precision,
    default_device,
    leads,
    peak_memory_bytes,
    world_size,
)
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.progress import bar, note
from stillhouse.signals.encodings import FrozenHead, Hidden
from stillhouse.signals.store import Store
from stillhouse.teachers.load import (
    check_loadable,
    load_config,
    load_model,
    load_tokenizer,
    save_tokenizer,
)
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.stored_head import load_head
from stillhouse.training import checkpoints
from stillhouse.training.objective import make_objective
from stillhouse.training.resuming import train_from_newest
from stillhouse.training.train_config import SCHEDULES, TrainRecipe
from stillhouse.training.trainer import DistillationTrainer

MODEL = "model"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PROJECTIONS = "distillation_projections"


@dataclass(frozen=True)
class TrainingResult:
    """`tokens` are supervised positions; `seconds` leave out held-out measurements."""

    steps: int
    planned_steps: int
    tokens: int
    seconds: float
    flops: int
    peak_memory_bytes: int
    precision: str


@dataclass(frozen=True)
class Batching:
    """How one optimizer step's windows are split. batch = micro x accumulation x processes."""

    micro: int
    accumulation: int
    processes: int
    steps: int


def plan_batches(section: TrainRecipe, windows: int, processes: int) -> Batching:
    """Raises RecipeError where the batch cannot be split evenly."""
    micro = section.micro_batch_size or max(1, section.batch_size // processes)
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
        steps = min(steps, section.max_steps)
    return Batching(micro, accumulation, processes, steps)


def train(
    student: Path,
    teacher: Path | None,
    windows: Windows,
    heldout: Windows,
    *,
    section: TrainRecipe,
    objective: ObjectiveRecipe,
    vocabulary: int | None,
    seed: int,
    out: Path,
    store: Store | None = None,
    stored_teacher: Path | None = None,
    asked_share: float = 1.0,
    more_teachers: Sequence[Path] = (),
    callbacks: Sequence[TrainerCallback] = (),
    trust_remote_code: bool = False,
) -> TrainingResult:
    """Trains the checkpoint in `student` and writes `out/model` (float32) and `out/metrics.jsonl`.

    teacher: None trains on the objective's terms alone, which must then need no teacher.
    store: the teacher's recorded answers. With a teacher beside it, what the store lacks is asked
    live; asked_share is then the share of tokens that it lacks, for the account. Without a
    teacher, held-out measurements know the perplexity alone.
    stored_teacher: the checkpoint of the store's teacher, whose head and shape a store of hidden
    states needs; its other weights are not read.
    more_teachers: asked live beside `teacher`; the loss is the mean of all of theirs.
    vocabulary: ids below it are shared by both models; rows beyond it are padding.
    callbacks: transformers calls them at every step, beside our own.
    Goes on from the newest checkpoint in `out/checkpoints` that loads, to the same weights as an
    undisturbed run gives. Under torchrun or accelerate launch every process calls this.
    """
    processes = world_size()
    plan = plan_batches(section, len(windows), processes)
    if windows.supervised_tokens == 0:
        raise TrainingError("no token of the training data is to be predicted", where=windows.path)
    device = default_device()
    precision = choose_precision(section.precision, device)
    main = leads()
    if main:
        note(f"precision: {precision.reason}")
    tokens_per_step = section.batch_size * windows.context
    shown = 0

    def make(meter: checkpoints.Meter) -> DistillationTrainer:
        nonlocal shown
        model = load_model(student, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model.requires_grad_(True)
        if section.freeze_head:
            model.get_output_embeddings().requires_grad_(False)
        guides = [
            load_model(path, dtype=precision.dtype, trust_remote_code=trust_remote_code)
            for path in ([] if teacher is None else [teacher, *more_teachers])
        ]
        code = trust_remote_code
        shaped = (guides[0] if guides else model).config
        if stored_teacher is not None:
            shaped = load_config(stored_teacher, trust_remote_code=code)
        terms = make_objective(objective, model.config, shaped, seed=seed)
        encoding = None if store is None else store.settings.encoding
        teacher_head = student_head = None
        if isinstance(encoding, Hidden) and any(term.needs_teacher for term in terms.divergences):
            assert stored_teacher is not None
            teacher_head = load_head(stored_teacher, dtype=precision.dtype, trust_remote_code=code)
        if isinstance(encoding, FrozenHead) and guides:
            student_head = load_head(student, dtype=torch.float32, trust_remote_code=code)
        if len(projections := terms.projections()):
            # A part of the module while it trains: optimizer, wrappers and checkpoints see them.
            model.add_module(PROJECTIONS, projections)
        # Only the first process writes: what others left would become part of the stage.
        metrics = checkpoints.MetricsFile(out / METRICS, keep_to_step=meter.step) if main else None
        advance(meter.step * tokens_per_step - shown)
        shown = meter.step * tokens_per_step
        trainer = DistillationTrainer(
            student=model,
            teachers=guides,
            store=store,
            teacher_head=teacher_head,
            student_head=student_head,
            objective=terms,
            dtype=precision.dtype,
            vocabulary=vocabulary,
            metrics=metrics,
            meter=meter,
            advance=advance,
            early_stop=section.early_stop,
            args=_arguments(section, plan, out / CHECKPOINTS, precision.dtype, device, seed),
            train_dataset=windows,
            eval_dataset=heldout,
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        for callback in (_Housekeeping(trainer, section, windows.context), *callbacks):
            trainer.add_callback(callback)
        return trainer

    with bar("train", total=plan.steps * tokens_per_step) as advance:
        trainer = train_from_newest(out / CHECKPOINTS, make, steps=plan.steps)
    done = trainer.meter()
    model = trainer.student
    if hasattr(model, PROJECTIONS):
        delattr(model, PROJECTIONS)
    with quiet():
        trainer.save_model(str(out / MODEL))
    if processes > 1:
        # A process that ends with its group still open may be aborted by gloo's own threads.
        trainer.accelerator.wait_for_everyone()
        atexit.register(_leave_group)
    if main:
        _check_saved(out / MODEL, trust_remote_code)
        (out / MODEL / "training_args.bin").unlink(missing_ok=True)
        save_tokenizer(load_tokenizer(student), out / MODEL)
    student_size = account.count_parameters(model).head_once
    teacher_size = sum(account.count_parameters(each).head_once for each in trainer.teachers)
    return TrainingResult(
        steps=done.step,
        planned_steps=plan.steps,
        tokens=done.tokens,
        seconds=done.seconds,
        flops=account.training_flops(student_size, done.tokens)
        + account.forward_flops(teacher_size, round(asked_share * done.tokens)),
        peak_memory_bytes=peak_memory_bytes(),
        precision=precision.reason,
    )


def _check_saved(model: Path, trust_remote_code: bool) -> None:
    """Raises TrainingError where the trained weights are not all in the folder: of sharded state
    dicts, transformers writes only checkpoints."""
    try:
        check_loadable(model, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise TrainingError(
            f"the trained model was not saved: {error.what}",
            where=model,
            fix="the checkpoints are kept; with FSDP, set fsdp_state_dict_type: FULL_STATE_DICT in "
            "the accelerate configuration, and give the same command again",
        ) from error


def _leave_group() -> None:
    gc.collect()  # a trainer is part of a reference cycle, and its DDP wrapper must go first
    if dist.is_initialized():
        dist.destroy_process_group()


def _arguments(
    section: TrainRecipe,
    plan: Batching,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> TrainingArguments:
    scheduler_kwargs: dict[str, Any] = {}
    warmup = round(section.warmup * plan.steps)
    if section.schedule == "wsd":
        scheduler_kwargs["num_decay_steps"] = max(1, round(section.decay * plan.steps))
    every = section.evaluate_every
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro,
        per_device_eval_batch_size=plan.micro,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=SCHEDULES[section.schedule],
        lr_scheduler_kwargs=scheduler_kwargs,
        warmup_steps=warmup,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device.type == "cpu" and plan.processes > 1 else None,
        logging_strategy="steps",
        logging_steps=max(1, plan.steps // 500),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=section.checkpoint_every,
        eval_strategy="no" if every is None else "steps",
        eval_steps=every,
        report_to=section.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        average_tokens_across_devices=True,
        **{checkpointing_key(): section.gradient_checkpointing},
    )


def checkpointing_key(arguments: Any = TrainingArguments) -> str:
    """The name of the option for activation checkpointing, which transformers 5.23 changed."""
    known = {field.name for field in fields(arguments)}
    new = "activation_checkpointing"
    return new if new in known else "gradient_checkpointing"


class _Housekeeping(TrainerCallback):
    """Moves the bar, and makes each checkpoint count only once it is whole on disk."""

    def __init__(self, trainer: DistillationTrainer, section: TrainRecipe, context: int) -> None:
        self.trainer = trainer
        self.section = section
        self.context = context

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.advance(self.section.batch_size * self.context)
        if control.should_save:
            control.should_log = True  # a checkpoint is written only after a finite-loss check

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        checkpoints.seal(checkpoint, self.trainer.meter())
        checkpoints.keep_newest(folder, self.section.keep_checkpoints)
