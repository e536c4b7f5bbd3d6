"""transformers.Trainer, taught to distill.

Shapes: R windows, L tokens a window, N supervised rows, D hidden width.

The student keeps its class; only this instance's `forward` is replaced, by one that goes from
tokens to the loss without ever making logits. So DDP and FSDP wrap a plain transformers model, and
their hooks fire around everything that uses its parameters, the head included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.data.shift import IGNORED, supervised_rows
from stillhouse.errors import TrainingError
from stillhouse.objectives import LossSum, Mixture, Tally, Term
from stillhouse.signals import DenseSignal, LMHead
from stillhouse.signals.encodings import Hidden
from stillhouse.signals.store import Store
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.record_store import local_teacher, segments_of
from stillhouse.teachers.views import Wanted, look
from stillhouse.training.attention import use_short_attention
from stillhouse.training.checkpoints import Meter, MetricsFile
from stillhouse.training.loss import (
    Batch,
    TeacherView,
    mean_loss,
    objective_loss,
    stored_view,
)
from stillhouse.training.objective import Objective
from stillhouse.training.resuming import ResumingTrainer

HELDOUT_KL = Term("forward_kl")
HELDOUT_CROSS_ENTROPY = Term("cross_entropy")


class DistillationTrainer(ResumingTrainer):
    """Losses are sums over rows, divided once by the batch's supervised tokens on all ranks."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        student: PreTrainedModel,
        teachers: Sequence[PreTrainedModel],
        store: Store | None,
        teacher_head: LMHead | None,
        student_head: LMHead | None,
        objective: Objective,
        dtype: torch.dtype,
        vocabulary: int | None,
        metrics: MetricsFile | None,
        meter: Meter,
        advance: Callable[[int], None],
        early_stop: int | None,
        **kwargs: Any,
    ) -> None:
        student.forward = _loss_forward(student, dtype, vocabulary)
        super().__init__(model=student, **kwargs)
        # Trainer counts labels[..., 1:] that are not -100, over accumulation steps and ranks:
        # exactly the rows that `supervised_rows` takes.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.student = student
        self.objective = objective
        self.metrics_file = metrics
        self.advance = advance
        self.early_stop = early_stop
        self.teachers = [teacher.to(self.args.device).eval() for teacher in teachers]
        for each in (student, *self.teachers):
            use_short_attention(each, self.train_dataset.context, self.args.device)
        self._store = store
        self._teacher_head = None if teacher_head is None else teacher_head.to(self.args.device)
        self._ask = None
        if store is not None and self.teachers:
            self._ask = local_teacher(self.teachers[0], store.settings, student_head)
        self._before = meter
        self._started = time.monotonic()
        self._tokens: Tensor | int = meter.tokens
        self._logged_tokens = meter.tokens
        self._logged_at = self._started
        self._tally = Tally()
        self._paused = 0.0
        self._measured: tuple[int, dict[str, float]] | None = None

    # --- the loss ----------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        progress = self.state.global_step / max(1, self.state.max_steps)
        if self._store is None:
            teachers = self._look_at_teachers(inputs, self.objective.of_teacher)
        else:
            teachers = [self._look_up(inputs, self._store)]
        outputs = model(**inputs, teachers=teachers, objective=self.objective, progress=progress)
        self._tally.add(outputs)
        assert num_items_in_batch is not None
        rows = torch.as_tensor(num_items_in_batch, device=outputs.total.device).clamp(min=1)
        # DDP and FSDP average gradients over ranks; the rows are already counted over all of them.
        loss = outputs.total * (self.accelerator.num_processes / rows)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens = self._tokens + items  # a tensor on a GPU: read only when it is logged
        return batches, items

    @torch.no_grad()
    def _look_at_teachers(self, inputs: Batch, wanted: Wanted) -> list[TeacherView]:
        views = []
        labels_RL = inputs["labels"]
        for teacher in self.teachers:
            seen = look(teacher, inputs["input_ids"], inputs["position_ids"], wanted)
            signal = DenseSignal(supervised_rows(seen.last_RLD, labels_RL), lm_head(teacher))
            layers = {i: supervised_rows(seen.layers[i], labels_RL) for i in seen.layers}
            views.append(TeacherView(signal, layers, seen.attention))
        return views

    def _look_up(self, inputs: Batch, store: Store) -> TeacherView:
        segments = segments_of(inputs)
        live = None
        missing_S = store.missing(segments)
        if self._ask is not None and missing_S.any():
            live, _ = self._ask(inputs, segments, missing_S)
        return stored_view(store.read(segments, live), self._teacher_head, self.args.device)

    # --- what is measured on the way -----------------------------------------------------------

    def meter(self) -> Meter:
        seconds = self._before.seconds + time.monotonic() - self._started - self._paused
        return Meter(self.state.global_step, int(self._tokens), seconds)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._step_metrics())
            self._check_finite(logs)
        super().log(logs, start_time)
        if self.metrics_file and ("loss" in logs or "heldout_perplexity" in logs):
            row = {"step": self.state.global_step, **logs}
            self.metrics_file.append({key: value for key, value in row.items() if key != "epoch"})

    def _step_metrics(self) -> dict[str, float]:
        now = time.monotonic()
        total = int(self._tokens)
        tokens = max(total - self._logged_tokens, 1)
        # Every rank holds its own sums and the count of all ranks; one reduction for all terms.
        names, sums = self._tally.take()
        means = (self.accelerator.reduce(sums) / tokens).tolist()
        metrics = dict(zip(names, means, strict=True))
        metrics["tokens"] = total
        metrics["tokens_per_s"] = tokens / max(now - self._logged_at, 1e-9)
        self._logged_tokens, self._logged_at = total, now
        return metrics

    def _check_finite(self, logs: dict[str, float]) -> None:
        values = torch.tensor([logs["loss"], logs.get("grad_norm", 0.0)])
        if not torch.isfinite(values).all():
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.state.global_step} "
                f"(loss {logs['loss']}, gradient norm {logs.get('grad_norm')})",
                where="training",
                fix="lower train.learning_rate, or look at the data with `stillhouse preview`; "
                "checkpoints before this step are kept",
            )

    # --- held-out measurement ------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out KL to the teacher (nats a token; of several, the mean) and perplexity, over all
        ranks. From a store of samples, the teacher's cross-entropy: the KL and a constant."""
        step = self.state.global_step
        if self._measured is not None and self._measured[0] == step:
            return self._measured[1]  # transformers asks again when the last step was measured
        began = time.monotonic()
        self.model.eval()
        batches = self._heldout_batches()
        store = None if self.teachers else self._store_of(batches)
        terms = [HELDOUT_CROSS_ENTROPY]
        if self.teachers or store is not None:
            terms.insert(0, HELDOUT_KL)
        objective = Objective(Mixture.of(*terms))
        sums = torch.zeros(len(terms) + 1, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in batches:
                if store is not None:
                    teachers = [self._look_up(batch, store)]
                else:
                    teachers = self._look_at_teachers(batch, objective.of_teacher)
                outputs = self.model_wrapped(
                    **batch, teachers=teachers, objective=objective, progress=0.0
                )
                rows = (batch["labels"][:, 1:] != IGNORED).sum()
                values = list(outputs.terms.values())
                names = list(outputs.terms)
                sums += torch.stack([*values, rows]).double()
        sums = self.accelerator.reduce(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        metrics = {"heldout_perplexity": float(torch.tensor(means[-1]).exp())}
        if len(means) > 1:
            metrics[f"heldout_{names[0].replace('forward_kl', 'kl')}"] = means[0]
        nearness = list(metrics)[-1]  # before `log` adds keys
        self.log(metrics)
        self._stop_when_no_better(nearness)
        pause = time.monotonic() - began
        self._paused += pause
        self._logged_at += pause
        self._measured = step, metrics
        return metrics

    def _store_of(self, batches: Sequence[Batch]) -> Store | None:
        """The store, if it can tell what the teacher says about these batches."""
        store = self._store
        if store is None or store.settings.temperature != 1.0:
            return None
        unknown = isinstance(store.settings.encoding, Hidden) and self._teacher_head is None
        covered = all(store.covers(segments_of(batch)) for batch in batches)
        # Another run's store may know some of the text: all ranks must measure the same.
        able = torch.tensor(float(covered and not unknown), device=self.args.device)
        every = float(self.accelerator.reduce(able)) == self.accelerator.num_processes
        return store if every else None

    def _heldout_batches(self) -> list[Batch]:
        """As many batches on every rank, since a wrapped model's forward may be collective."""
        windows = self.eval_dataset
        world, rank = self.args.world_size, self.args.process_index
        size = self.args.per_device_eval_batch_size
        batches = []
        for start in range(0, len(windows), size * world):
            first = start + rank * size
            rows = [windows[i] for i in range(first, min(first + size, len(windows)))]
            if not rows:
                rows = [{**windows[0], "labels": torch.full_like(windows[0]["labels"], IGNORED)}]
            batches.append(self._prepare_inputs(self.data_collator(rows)))
        return batches

    def _stop_when_no_better(self, key: str) -> None:
        if self.early_stop is None:
            return
        rows = self.metrics_file.rows if self.metrics_file else []
        history = [row[key] for row in rows if key in row]
        since_best = len(history) - 1 - history.index(min(history)) if history else 0
        stop = torch.tensor(float(since_best >= self.early_stop), device=self.args.device)
        # Only rank zero holds the history; every rank must stop at the same step.
        if float(self.accelerator.reduce(stop)) > 0:
            self.control.should_training_stop = True


def _loss_forward(
    student: PreTrainedModel, dtype: torch.dtype, vocabulary: int | None
) -> Callable[..., LossSum]:
    def forward(
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        teachers: Sequence[TeacherView],
        objective: Objective,
        progress: float,
    ) -> LossSum:
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        seen = look(student, input_ids, position_ids, objective.of_student)
        about: dict[str, Any] = {"progress": progress, "vocabulary": vocabulary, "dtype": dtype}
        views: Sequence[TeacherView | None] = teachers or [None]
        losses = [objective_loss(objective, student, seen, view, batch, **about) for view in views]
        return mean_loss(losses)

    return forward
