"""Training that resumes from the newest loadable checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from stillhouse.hardware import HeapLimit, default_device, free_memory
from stillhouse.launch import leads
from stillhouse.progress import note
from stillhouse.teachers.quiet import quiet
from stillhouse.training import checkpoints
from stillhouse.training.checkpoints import Meter
from stillhouse.training.compact_adamw import clip_gradients
from stillhouse.training.partition import ProcessBatches
from stillhouse.training.train_config import SCHEDULES, StepsRecipe


class UnreadableCheckpointError(Exception):
    """A complete checkpoint cannot be loaded. If one process raises this, all do."""


def step_arguments(
    section: StepsRecipe, folder: Path, *, steps: int, rows: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """The TrainingArguments that all kinds of training share.

    rows: of a micro-batch. dtype: of matrix products.
    """
    device = default_device()
    return {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": SCHEDULES[section.schedule],
        "warmup_steps": round(section.warmup * steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": section.checkpoint_every,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type != "cpu",
    }


class ResumingTrainer(Trainer):
    """transformers.Trainer that can also resume at its last step, and that distinguishes
    checkpoints that fail to load from other failures. A process uses at most one GPU."""

    def __init__(self, *, args: TrainingArguments, **more: Any) -> None:
        # On a machine with several GPUs, Trainer would use torch.nn.DataParallel.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(args=args, **more)

    def process_batches(self) -> ProcessBatches:
        """The rows of this process's batches: each row once per epoch, for any number of
        processes."""
        args = self.args
        return ProcessBatches(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            process=args.process_index,
            processes=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def forget(self, before: int) -> None:
        """Delete what is not needed to resume at this step or later."""

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if any(each.dtype == torch.bfloat16 for each in model.parameters()):
            return clip_gradients(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **more: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            with self._loading():
                state = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
                TrainerState.load_from_json(str(state))
        return super().train(resume_from_checkpoint, **more)

    def _run_epoch(self, *args: Any, **more: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # From a checkpoint of the last step, transformers would run one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **more)

    def _load_from_checkpoint(self, *args: Any, **more: Any) -> None:
        with self._loading():
            super()._load_from_checkpoint(*args, **more)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with self._loading():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._loading():
            super()._load_rng_state(checkpoint)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Raise UnreadableCheckpointError on every process if the block fails on one."""
        failure: Exception | None = None
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged file can raise many types
            failure = error
        failed = torch.tensor(float(failure is not None), device=self.args.device)
        if float(self.accelerator.reduce(failed)) > 0:
            raise UnreadableCheckpointError(str(failure or "another process could not load it"))


class Housekeeping(TrainerCallback):
    """Updates the progress bar, limits the heap, and seals each checkpoint once it is complete on
    disk.

    trainer: must have `meter()` and `metrics`. keep: number of newest checkpoints to keep. advance:
    called after each step.
    """

    def __init__(self, trainer: Any, keep: int, advance: Callable[[], object]) -> None:
        self.trainer, self.keep, self.advance = trainer, keep, advance
        self.heap = HeapLimit()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # not the value stored in the checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance()
        self.heap.check()
        if control.should_save:
            control.should_log = True  # logging checks for a finite loss before a checkpoint

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own files
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        checkpoints.seal(checkpoint, self.trainer.meter(), self.trainer.metrics)
        checkpoints.keep_newest(folder, self.keep)
        self.trainer.forget(checkpoints.oldest_step(folder))


T = TypeVar("T", bound=ResumingTrainer)


def train_from_newest(folder: Path, make: Callable[[Meter], T], *, steps: int) -> T:
    """Train from the newest checkpoint in `folder` that can be loaded, or from the start.

    make: builds the models and the trainer for the progress so far. It is called again if a
    checkpoint, which is then renamed, fails to load. Returns the trainer that finished.
    """
    while True:
        found = checkpoints.latest(folder)
        if leads():
            checkpoints.drop_unusable(folder)
        checkpoint, meter = found if found else (None, Meter())
        if checkpoint and leads():
            note(f"resuming from step {meter.step} of {steps}")
        trainer = make(meter)
        try:
            with quiet():
                trainer.train(None if checkpoint is None else str(checkpoint))
            return trainer
        except UnreadableCheckpointError as error:
            assert checkpoint is not None
            if leads():
                checkpoints.set_aside(checkpoint, str(error))
            trainer.accelerator.wait_for_everyone()
        del trainer
        free_memory()  # a reference cycle keeps its models, which are loaded again
