"""transformers.Trainer for distillation, which trains a `Distillation` and queries a teacher.

Shapes: R windows, L tokens per window, N supervised rows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from stillhouse.data.batches import Batch, collate, own_share, positions_of, rows_in_order
from stillhouse.data.windows import ARRAYS
from stillhouse.errors import RecipeError, SignalError
from stillhouse.launch import world_size
from stillhouse.objectives import Tally
from stillhouse.objectives.objective_config import ObjectiveRecipe, ObjectiveTerm
from stillhouse.processes import release_gathered, shard, sharding_mesh
from stillhouse.students.student import Student
from stillhouse.teachers.packed_attention import use_attention
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherView, require_chunks
from stillhouse.training import sharded_checkpoint
from stillhouse.training.checkpoints import Meter, Metrics, check_finite, step_of
from stillhouse.training.distillation import Distillation
from stillhouse.training.measures import heldout_teacher, measure_heldout, measurements_since_best
from stillhouse.training.objective import Objective
from stillhouse.training.on_policy import OnPolicy
from stillhouse.training.partition import WithEmptyRow, row_loader
from stillhouse.training.resuming import ResumingTrainer
from stillhouse.training.rollouts import OwnBatch
from stillhouse.training.score_step import score_step, scores_steps
from stillhouse.training.step_rows import StepSampler


class DistillationTrainer(ResumingTrainer):
    """Trains a student to match a teacher. Subclass it as you would transformers.Trainer.

    Losses are sums over rows, divided once by the batch's supervised tokens on all ranks. The model
    that is trained and passed to callbacks is a `Distillation`, whose `student` is the plain
    transformers model and can generate at any time. Checkpoints are plain model folders.

    student: its weights are trained in place. teacher: None if no term needs one. objective:
    terms, a recipe's section, or an `Objective`. metrics, meter: of a resumed run. early_stop:
    stop after this many held-out evaluations without an improvement. shards: number of processes
    that the student is sharded over (FSDP2); 1: each has a copy. own: the text that the student
    generates in this training run.
    Raises ModelError: vocabularies that differ. SignalError: terms that the teacher does not
    support.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: Student | PreTrainedModel,
        teacher: Teacher | PreTrainedModel | None = None,
        objective: Objective | ObjectiveRecipe | Sequence[ObjectiveTerm] | None = None,
        *,
        metrics: Metrics | None = None,
        meter: Meter | None = None,
        early_stop: int | None = None,
        shards: int = 1,
        own: OnPolicy | None = None,
        data_collator: Any = collate,
        **kwargs: Any,
    ) -> None:
        args: TrainingArguments = kwargs.pop("args", None) or TrainingArguments()
        self.student = student if isinstance(student, Student) else Student(student)
        self.student.cut_rows_without_tokens()
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = Teacher.from_model(teacher)
        self.teacher = teacher
        if not any(parameter.requires_grad for parameter in self.student.model.parameters()):
            self.student.trainable()
        model = Distillation(self.student, objective, teacher, seed=args.seed)
        self.objective = model.objective
        self._prepare_teacher(kwargs.get("train_dataset"))
        self.own = own
        if own is not None:
            own.prepare(self.student, teacher)
        # DDP would sum the gradients of bfloat16 weights in bfloat16.
        self._sharded = shards > 1 or (model.is_narrow and world_size() > 1)
        if self._sharded:
            shard(model, model.student, sharding_mesh(shards))
            if self.student.unread:
                assert self.student.source is not None
                model.read_student(self.student.source)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RecipeError(
                "accelerate is configured for FSDP or DeepSpeed, which Stillhouse does not use",
                where="accelerate's configuration",
                fix="start with torchrun, and use train.shard to shard models",
            )
        # A sharded module reduces its own gradients, so accelerate must not wrap it.
        self.is_distributed_loading_by_transformers = self._sharded
        if self._sharded:
            # Autocast would keep a copy of every gathered weight until the end of the forward pass.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self._signature_columns = list(ARRAYS)
        self._place_models()
        self.metrics = metrics or Metrics()
        self.early_stop = early_stop
        self._before = meter or Meter()
        self._started = time.monotonic()
        self._tokens: Tensor | int = self._before.tokens
        self._logged_tokens = self._before.tokens
        self._logged_at = self._started
        self._tally, self._own_tally = Tally(), Tally()
        self._own_tokens = self._logged_own_tokens = self._before.own_tokens
        self._processed_tokens = self._before.processed_tokens
        self._paused = 0.0
        self._views: Iterator[TeacherView] = iter(())  # of the optimizer step's micro-batches
        self._measured: tuple[int, dict[str, float]] | None = None

    def _prepare_teacher(self, text: Any) -> None:
        needs = replace(
            self.objective.needs,
            tokenizer=self.student.tokenizer,
            frozen_head=self.student.frozen_head,
        )
        if self.teacher is not None:
            require_chunks(self.teacher, needs)
            self.teacher.prepare(needs, text if hasattr(text, "supervised_tokens") else None)
        elif needs.teacher:
            raise SignalError(
                "a term compares the student with a teacher, but there is none",
                where="objective.terms",
                fix="give a teacher, or use only cross_entropy",
            )

    def _place_models(self) -> None:
        """Place the teacher, and choose the student's attention now that Trainer has moved it."""
        text = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        context = len(text[0]["input_ids"])
        dtype = torch.bfloat16 if self.args.bf16 else self.student.model.dtype
        use_attention(self.student.model, context, self.args.device, dtype)
        if self.teacher is not None:
            self.teacher.place(self.args.device, context)

    # --- the loss ----------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        progress = self.state.global_step / max(1, self.state.max_steps)
        own = self.own if isinstance(inputs, OwnBatch) else None
        objective = None if own is None else own.objective
        view, measure = self._view(inputs), own is not None
        outputs = model(inputs, view, progress, objective, measure)
        (self._tally if own is None else self._own_tally).add(outputs)
        count = outputs.rows if num_items_in_batch is None else num_items_in_batch
        rows = count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
        # DDP and FSDP average gradients over ranks, but `rows` already counts all ranks.
        loss = outputs.total * (self.accelerator.num_processes / rows)
        return (loss, outputs) if return_outputs else loss

    def _view(self, inputs: Batch) -> TeacherView | None:
        if self.teacher is None:
            return None
        view = next(self._views, None)
        return self._answer(inputs) if view is None else view  # None: outside of a training step

    def _answer(self, batch: Batch) -> TeacherView:
        assert self.teacher is not None
        if self.own is not None and isinstance(batch, OwnBatch):
            return self.own.teacher.answer(batch)
        return self.teacher.answer(batch, self.objective.needs.activations)

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)  # the loader pins memory
        return super()._prepare_input(data)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader with every window once per epoch, for any number of processes."""
        own, dataset = self.own, WithEmptyRow(self.train_dataset)
        rows = StepSampler(own.plan, own.micro, own.steps) if own else self.process_batches()
        return row_loader(rows, dataset, self.args, self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        if self.own is not None:
            given = list(itertools.islice(epoch_iterator, num_batches))
            self._place_own_text(self.own, given)
            epoch_iterator = iter(given)
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens = self._tokens + items  # on a GPU, a tensor that is read only for logging
        # Teachers get the batches on the host, since some look up the text in a store.
        if self.teacher is not None and scores_steps(self.teacher):
            own = [batch for batch in batches if isinstance(batch, OwnBatch)]
            data = batches[: len(batches) - len(own)]
            rows, request = self.args.per_device_train_batch_size, self.objective.needs.activations
            parts = [score_step(self.teacher, data, request, device, rows=rows)]
            if self.own is not None:
                parts.append(score_step(self.own.teacher, own, OUTPUT_ONLY, device, rows=rows))
            self._views = itertools.chain.from_iterable(parts)
        elif self.teacher is not None:
            self._views = map(self._answer, batches)
        return batches, items

    def _get_num_items_in_batch(self, batches: list[Batch], device: torch.device) -> Tensor | int:
        """The supervised tokens of an optimizer step over all processes, which divide the loss."""
        own = sum(len(positions_of(batch)) for batch in batches)
        if self.args.world_size == 1:
            return own
        every: Tensor = self.accelerator.gather(torch.tensor([own]).to(device, non_blocking=True))
        return every.sum()

    def _place_own_text(self, own: OnPolicy, batches: list[Batch]) -> None:
        """Put the student's own text into a step's micro-batches, after generating it if needed."""
        step, module = self.state.global_step, self._distillation
        callbacks = self.callback_handler.callbacks
        row = own.begin(step, module, callbacks, self.accelerator, sharded=self._sharded)
        if row is not None:
            self._processed_tokens += own.processed_tokens
            self.metrics.append(row)
        self._own_tokens += own.place(step, batches)
        if step == own.plan.cold_steps:
            self.model.eval()
            own.compare_kinds(self.model_wrapped, batches, self.accelerator)
            if self._sharded:
                release_gathered(self.model)

    # --- checkpoints ---------------------------------------------------------------------------

    def forget(self, before: int) -> None:
        if self.own is not None:
            self.own.forget(before)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as a plain folder, except in checkpoints of a sharded student, which
        contain shards."""
        folder = Path(output_dir or self.args.output_dir)
        if not self._sharded:
            super().save_model(str(folder), _internal_call)
        elif not _internal_call:
            release_gathered(self.model)
            self._distillation.save_sharded_student(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self._distillation.save_student(Path(output_dir or self.args.output_dir), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            if self.args.should_save:
                self._distillation.save_projections(folder)
            return
        sharded_checkpoint.save_parts(folder, self._distillation, self._own_optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, module = Path(resume_from_checkpoint), self._distillation
        with self._loading():
            if self.own is not None:
                self.own.require(step_of(folder))
            if sharded_checkpoint.is_sharded(folder):
                sharded_checkpoint.load_weights(folder, module)
                return
            if not self._sharded:
                Trainer._load_from_checkpoint(self, str(folder), self.student.model)
                module.load_projections(folder)
                return
            module.read_student(self.student.checkpoint(folder))
            sharded_checkpoint.distribute_weights(module, module.read_projections(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, module = Path(checkpoint), self._distillation
        in_parts = sharded_checkpoint.is_sharded(folder)
        if not self._sharded and not in_parts:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with self._loading():
            if in_parts:
                sharded_checkpoint.load_optimizer(folder, module, self._own_optimizer)
            else:
                file = folder / OPTIMIZER_NAME
                sharded_checkpoint.distribute_optimizer(file, module, self._own_optimizer)
            state = torch.load(folder / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(state)

    @property
    def _own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        own = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(own, torch.optim.Optimizer)
        return own

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Before an optimizer step's last micro-batch, reduce gradients only within a group that
        shards the weights, not between such groups. Unreduced gradients would not fit in memory."""
        self.model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            self.model.set_requires_all_reduce(True)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self._sharded:  # shards are already where they belong
            super()._move_model_to_device(model, device)

    @property
    def _distillation(self) -> Distillation:
        return self.accelerator.unwrap_model(self.model)

    # --- measurements during training ----------------------------------------------------------

    def meter(self) -> Meter:
        """Training progress so far, over all processes."""
        seconds = self._before.seconds + time.monotonic() - self._started - self._paused
        own, processed = self._own_tokens, self._processed_tokens
        return Meter(self.state.global_step, int(self._tokens), seconds, own, processed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._step_metrics())
            check_finite(logs, self.state.global_step)
        super().log(logs, start_time)
        if "loss" in logs or "heldout_perplexity" in logs:
            row = {"step": self.state.global_step, **logs}
            self.metrics.append({key: value for key, value in row.items() if key != "epoch"})

    def _step_metrics(self) -> dict[str, float]:
        now = time.monotonic()
        total, own = int(self._tokens), self._own_tokens
        tokens, of_own = total - self._logged_tokens, own - self._logged_own_tokens
        # Every rank has its own sums and the count of all ranks, so one reduction is enough.
        metrics = self._tally.means(tokens - of_own, self.accelerator.reduce)
        of_own_text = self._own_tally.means(of_own, self.accelerator.reduce)
        metrics |= {f"own_{name}": mean for name, mean in of_own_text.items()}
        metrics["tokens"] = total
        if self.own is not None:
            metrics["own_tokens"] = own
        metrics["tokens_per_s"] = tokens / max(now - self._logged_at, 1e-9)
        self._logged_tokens, self._logged_own_tokens, self._logged_at = total, own, now
        return metrics

    # --- held-out measurement ------------------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the held-out KL to the teacher (nats/token; the mean over several teachers) and
        the perplexity, over all ranks.

        With a store of samples, the KL is replaced by the teacher's cross-entropy, which differs
        from it by a constant.
        """
        step = self.state.global_step
        if self._measured is not None and self._measured[0] == step:
            return self._measured[1]  # transformers evaluates again after the last step
        began = time.monotonic()
        args, windows = self.args, self.eval_dataset
        tokens = args.per_device_eval_batch_size * len(windows[0]["labels"])
        rows = own_share(rows_in_order(windows, tokens), args.process_index, args.world_size)
        batches = [self.data_collator(each) for each in rows]
        teacher = heldout_teacher(self.teacher, batches, self.accelerator)
        self.model.eval()
        metrics = measure_heldout(self.model_wrapped, teacher, batches, self.accelerator)
        if self._sharded:
            release_gathered(self.model)
        nearness = list(metrics)[-1]  # before `log` adds keys
        self.log(metrics)
        self._stop_when_no_better(nearness)
        pause = time.monotonic() - began
        self._paused += pause
        self._logged_at += pause
        self._measured = step, metrics
        return metrics

    def _stop_when_no_better(self, key: str) -> None:
        if self.early_stop is None:
            return
        waited = measurements_since_best(self.metrics.rows, key)
        stop = torch.tensor(float(waited >= self.early_stop), device=self.args.device)
        # In a resumed run, only rank 0 has the history, but all must stop at the same step.
        if float(self.accelerator.reduce(stop)) > 0:
            self.control.should_training_stop = True
