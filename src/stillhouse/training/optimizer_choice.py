"""A recipe's optimizer, in the form that transformers.Trainer accepts."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.training.compact_adamw import CompactAdamW
from stillhouse.training.muon import muon_for
from stillhouse.training.train_config import TrainRecipe


def chosen_optimizer(
    settings: TrainRecipe, products: torch.dtype, seed: int
) -> tuple[Any, dict[str, Any]] | None:
    """Return Trainer's `optimizer_cls_and_kwargs`; None for PyTorch's AdamW.

    The first is an optimizer class, or a function that returns a function of the model. products:
    dtype of matrix products.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "seed": seed,
    }
    if settings.optimizer == "muon":
        options |= {"products": products, "weight_decay": settings.weight_decay}
        return (lambda: muon_for), options
    bits = 8 if settings.optimizer == "adamw_8bit" else 32
    if bits == 32 and settings.weights == "float32":
        return None
    return CompactAdamW, {**options, "bits": bits}
