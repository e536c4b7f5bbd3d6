"""Trains a classifier on distributions over labels, resumable at any time.

Shapes: B texts of a batch, N texts, C labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stillhouse.classify.classifier import Classifier, load_classifier
from stillhouse.classify.classify_config import FitRecipe
from stillhouse.errors import TrainingError
from stillhouse.hardware import choose_precision, default_device, peak_memory_bytes
from stillhouse.progress import bar, note
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.training import checkpoints
from stillhouse.training.resuming import ResumingTrainer, train_from_newest
from stillhouse.training.train_config import SCHEDULES

MODEL, METRICS = "model", "metrics.jsonl"


@dataclass(frozen=True)
class FitResult:
    """loss: mean cross-entropy with the targets over the last tenth of the steps, in nats."""

    steps: int
    texts: int
    tokens: int
    seconds: float
    loss: float
    peak_memory_bytes: int
    precision: str


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

    The loss is -sum_c q(c) log p(c), its mean over texts, which differs from KL(q || p) by the
    targets' own entropy. Resumes from the newest checkpoint in `out/checkpoints` that loads.
    """
    precision = choose_precision(section.precision, default_device())
    note(f"precision: {precision.reason}")
    steps = planned_steps(section, len(texts))
    arguments = _arguments(section, steps, out / checkpoints.CHECKPOINTS, precision.dtype, seed)
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
        trainer = _Fitter(classifier, args=arguments, train_dataset=examples)
        trainer.metrics = checkpoints.Metrics(out / METRICS, keep_to_step=meter.step)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Housekeeping(section, trainer.metrics, meter, advance))
        return trainer

    with bar("train", total=steps * section.batch_size, unit="texts") as advance, quiet():
        trainer = train_from_newest(out / checkpoints.CHECKPOINTS, make, steps=steps)
    classifier, metrics = trainer.classifier, trainer.metrics
    losses = [row["loss"] for row in metrics.rows if "loss" in row]
    if not losses or not all(map(math.isfinite, losses)):
        raise TrainingError(
            "the loss is not finite",
            where="train",
            fix="lower train.learning_rate, or set train.precision to float32",
        )
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


class _Fitter(ResumingTrainer):
    metrics: checkpoints.Metrics

    def __init__(self, classifier: Classifier, **more: Any) -> None:
        self.classifier = classifier
        super().__init__(model=classifier.model, data_collator=_collate, **more)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        # Some classifiers run the model's parts directly, bypassing the forward that the Trainer
        # wraps.
        with self.accelerator.autocast():
            logits_BC = self.classifier.logits(inputs["ids"], self.classifier.model)
        target_BC = inputs["target"].to(logits_BC.device)
        loss = -(target_BC * logits_BC.float().log_softmax(-1)).sum(-1).mean()
        return (loss, logits_BC) if return_outputs else loss


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    targets = torch.stack([example["target"] for example in examples])
    return {"ids": [example["ids"] for example in examples], "target": targets}


def _arguments(
    section: FitRecipe, steps: int, folder: Path, dtype: torch.dtype, seed: int
) -> TrainingArguments:
    device = default_device()
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        max_steps=steps,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        lr_scheduler_type=SCHEDULES[section.schedule],
        warmup_steps=round(section.warmup * steps),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        logging_strategy="steps",
        logging_steps=max(1, steps // 200),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=section.checkpoint_every,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )


class _Housekeeping(TrainerCallback):
    """Updates the progress bar and the metrics, and seals complete checkpoints."""

    def __init__(
        self,
        section: FitRecipe,
        metrics: checkpoints.Metrics,
        meter: checkpoints.Meter,
        advance: Any,
    ) -> None:
        self.section, self.metrics, self.advance = section, metrics, advance
        self.before, self.began = meter.seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.section.batch_size)
        if control.should_save:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.metrics.append(
                {"step": state.global_step, "loss": logs["loss"], "seconds": self.seconds}
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        meter = checkpoints.Meter(state.global_step, 0, self.seconds)
        checkpoints.seal(checkpoint, meter, self.metrics)
        checkpoints.keep_newest(folder, 2)
