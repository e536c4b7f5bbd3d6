"""Training on top of transformers.Trainer: resumable, distributed, and summed before it divides."""

from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.objective import (
    Objective,
    make_objective,
    stored_layers,
    stored_temperature,
)
from stillhouse.training.train import (
    CHECKPOINTS,
    METRICS,
    MODEL,
    Batching,
    TrainingResult,
    plan_batches,
    train,
)

__all__ = [
    "CHECKPOINTS",
    "METRICS",
    "MODEL",
    "Batching",
    "Objective",
    "TrainingResult",
    "make_objective",
    "plan_batches",
    "read_metrics",
    "stored_layers",
    "stored_temperature",
    "train",
]
