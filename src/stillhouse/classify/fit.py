"""Trains a classifier on distributions over labels, resumable at any time.

Shapes: B texts of a batch, N texts, C labels.
"""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stillhouse.classify.classifier import Classifier, load_classifier
from stillhouse.classify.classify_config import FitRecipe
from stillhouse.errors import RecipeError, TrainingError
from stillhouse.hardware import choose_precision, peak_memory_bytes
from stillhouse.processes import leave_group
from stillhouse.progress import bar, note
from stillhouse.shared_work import all_processes
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.training import checkpoints
from stillhouse.training.partition import row_loader
from stillhouse.training.resuming import (
    Housekeeping,
    ResumingTrainer,
    step_arguments,
    train_from_newest,
)

MODEL = "model"
Batch = dict[str, Any]


@dataclass(frozen=True)
class FitResult:
    """The result of a training. loss: mean cross-entropy with the targets over the last tenth of
    the steps, in nats."""

    steps: int
    texts: int
    tokens: int
    seconds: float
    loss: float
    peak_memory_bytes: int
    precision: str


def texts_each(section: FitRecipe, processes: int) -> int:
    """Number of texts that each process reads per step. Raises RecipeError if not an integer."""
    if section.batch_size % processes:
        raise RecipeError(
            f"train.batch_size {section.batch_size} is not a multiple of {processes} processes",
            where="train.batch_size",
            fix=f"use a multiple of {processes}, or start fewer processes",
        )
    return section.batch_size // processes


def planned_steps(section: FitRecipe, texts: int) -> int:
    return max(1, math.ceil(section.epochs * math.ceil(texts / section.batch_size)))


def fit(
    student: Path,
    texts: Sequence[str],
    targets_NC: Tensor,
    *,
    section: FitRecipe,
    seed: int,
    out: Path,
) -> FitResult:
    """Train the classifier in `student` and write `out/model` (float32) and `out/metrics.jsonl`.

    The loss is the mean over texts of -sum_c q(c) log p(c), which differs from KL(q || p) by the
    entropy of the targets. Resumes from the newest checkpoint in `out/checkpoints` that loads.
    Under torchrun, every process calls this with the same arguments.
    """
    processes = all_processes()
    together = texts_each(section, processes.count)
    precision = choose_precision(section.precision)
    if processes.leads:
        note(f"precision: {precision.reason}")
    steps = planned_steps(section, len(texts))
    folder = out / checkpoints.CHECKPOINTS
    common = step_arguments(
        section, folder, steps=steps, rows=together, dtype=precision.dtype, seed=seed
    )
    arguments = TrainingArguments(logging_steps=max(1, steps // 200), **common)
    file = out / checkpoints.METRICS if processes.leads else None
    shown = 0

    def make(meter: checkpoints.Meter) -> _Fitter:
        nonlocal shown
        classifier = load_classifier(student)
        classifier.model.requires_grad_(True)
        if section.freeze_embeddings:
            classifier.model.get_input_embeddings().requires_grad_(False)
        rows = classifier.tokens(texts)
        examples = [{"ids": ids, "target": q} for ids, q in zip(rows, targets_NC, strict=True)]
        advance(meter.step * section.batch_size - shown)
        shown = meter.step * section.batch_size
        trainer = _Fitter(
            classifier,
            checkpoints.Metrics(file, keep_to_step=meter.step),
            meter.seconds,
            args=arguments,
            train_dataset=examples,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Housekeeping(trainer, 2, partial(advance, section.batch_size)))
        return trainer

    with bar("train", total=steps * section.batch_size, unit="texts") as advance, quiet():
        trainer = train_from_newest(folder, make, steps=steps)
    if processes.count > 1:
        trainer.accelerator.wait_for_everyone()
        atexit.register(leave_group)
    classifier, metrics = trainer.classifier, trainer.metrics
    losses = [row["loss"] for row in metrics.rows if "loss" in row]
    if not losses or not all(map(math.isfinite, losses)):
        raise TrainingError(
            "the loss is not finite",
            where="train",
            fix="lower train.learning_rate, or set train.precision to float32",
        )
    if processes.leads:
        with quiet():
            classifier.model.save_pretrained(out / MODEL)
            save_tokenizer(classifier.tokenizer, out / MODEL)
        classifier.facts.save(out / MODEL)
    last = losses[-max(1, len(losses) // 10) :]
    epochs = steps / math.ceil(len(texts) / section.batch_size)
    return FitResult(
        steps=steps,
        texts=len(texts),
        tokens=round(epochs * sum(len(row["ids"]) for row in trainer.train_dataset)),
        seconds=metrics.rows[-1]["seconds"],
        loss=sum(last) / len(last),
        peak_memory_bytes=peak_memory_bytes(),
        precision=precision.reason,
    )


class _Loss(nn.Module):
    """The module that is trained. Its forward is the loss, because some classifiers call parts of
    their model directly, but DDP expects gradients to come from its module's forward."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier.model
        self.logits = classifier.logits
        self.config = classifier.model.config

    def forward(self, ids: list[list[int]], target_BC: Tensor) -> Tensor:
        """The loss, summed over the texts."""
        logits_BC = self.logits(ids)
        return -(target_BC.to(logits_BC.device) * logits_BC.float().log_softmax(-1)).sum()


class _Fitter(ResumingTrainer):
    """Trains a classifier. seconds: training time of earlier processes."""

    loss_is_scaled_for_ga = True

    def __init__(
        self, classifier: Classifier, metrics: checkpoints.Metrics, seconds: float, **more: Any
    ) -> None:
        self.classifier, self.metrics = classifier, metrics
        self._began = time.monotonic() - seconds
        super().__init__(model=_Loss(classifier), data_collator=_collate, **more)

    def meter(self) -> checkpoints.Meter:
        return checkpoints.Meter(self.state.global_step, 0, time.monotonic() - self._began)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            meter = self.meter()
            self.metrics.append(
                {"step": meter.step, "loss": logs["loss"], "seconds": meter.seconds}
            )
        super().log(logs, start_time)

    def compute_loss(
        self, model: Any, inputs: Batch, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        # DDP averages gradients over processes, but the number of texts is summed over them.
        total: Tensor = model(inputs["ids"], inputs["target"])
        return total * (self.accelerator.num_processes / num_items_in_batch)

    def _get_num_items_in_batch(self, batches: list[Batch], device: torch.device) -> Any:
        """Number of texts in an optimizer step, over all processes."""
        own = torch.tensor(sum(batch["texts"] for batch in batches), device=device)
        return self.accelerator.reduce(own)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Yield every text once per epoch, for any number of processes."""
        examples = self.train_dataset
        nothing = {**examples[0], "target": torch.zeros_like(examples[0]["target"])}
        return row_loader(self.process_batches(), [*examples, nothing], self.args, _collate)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.classifier.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self.classifier.model)


def _collate(examples: list[dict[str, Any]]) -> Batch:
    """Collate examples. texts: number of examples whose target is not all zeros."""
    targets = torch.stack([example["target"] for example in examples])
    ids = [example["ids"] for example in examples]
    return {"ids": ids, "target": targets, "texts": int(targets.any(-1).sum())}
