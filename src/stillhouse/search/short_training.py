"""Short distillation in memory, to see how well a candidate learns in a few steps.

Shapes: N counted rows, D hidden width.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stillhouse.objectives import Term, fused_loss
from stillhouse.progress import bar
from stillhouse.pruning.calibrate import products
from stillhouse.pruning.reference import Reference, rows_of
from stillhouse.signals import DenseSignal
from stillhouse.teachers.backbone import lm_head
from stillhouse.training.train_config import TrainRecipe

WARMUP = 0.1
"""Fraction of the steps for learning-rate warmup; cosine decay follows."""


def distill_shortly(
    model: Any,
    known: Reference,
    *,
    first: int,
    steps: int,
    section: TrainRecipe,
    dtype: torch.dtype,
) -> None:
    """Train in place with forward KL to the teacher's outputs, one batch per step.

    The optimizer starts afresh, so that a round depends only on the weights before it. Learning
    rate, betas, weight decay, and maximum gradient norm come from the recipe.

    first: index of the first batch; batches wrap around.
    """
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=section.learning_rate,
        betas=section.betas,
        weight_decay=section.weight_decay,
        fused=model.device.type != "mps",
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    term = (Term("forward_kl"),)
    with bar("Trying a shape", steps, unit="steps") as advance:
        for step in range(steps):
            place = (first + step) % len(known.batches)
            batch, full_ND = known.batches[place], known.rows[place]
            with products(model, dtype):
                rows_ND = rows_of(model, batch)
            loss = fused_loss(
                rows_ND,
                lm_head(model),
                term,
                signal=DenseSignal(full_ND, known.head),
                scale=1 / max(1, len(full_ND)),
                vocab_size=known.vocabulary,
                compute_dtype=dtype,
            )
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), section.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            advance(1)
    model.requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
