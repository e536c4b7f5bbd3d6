"""Distillation losses: what the student is trained to match, and how the distance is measured.

Usable on their own with plain PyTorch: `fused_loss` takes hidden rows, an LM head, and a signal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.objectives.chunks import chunk_loss
    from stillhouse.objectives.features import (
        HiddenStateLoss,
        LayerMap,
        layer_logits_loss,
        map_layers,
    )
    from stillhouse.objectives.fused import fused_loss
    from stillhouse.objectives.objective_names import PARAMETERS
    from stillhouse.objectives.relation import AttentionStates, capture, relation_loss
    from stillhouse.objectives.terms import LossSum, Mixture, Schedule, Tally, Term

__all__ = [
    "PARAMETERS",
    "AttentionStates",
    "HiddenStateLoss",
    "LayerMap",
    "LossSum",
    "Mixture",
    "Schedule",
    "Tally",
    "Term",
    "capture",
    "chunk_loss",
    "fused_loss",
    "layer_logits_loss",
    "map_layers",
    "relation_loss",
]

_OWNERS = {
    "chunks": ["chunk_loss"],
    "features": ["HiddenStateLoss", "LayerMap", "layer_logits_loss", "map_layers"],
    "fused": ["fused_loss"],
    "objective_names": ["PARAMETERS"],
    "relation": ["AttentionStates", "capture", "relation_loss"],
    "terms": ["LossSum", "Mixture", "Schedule", "Tally", "Term"],
}


def __getattr__(name: str) -> Any:
    # Import lazily: reading a recipe must not wait for torch.
    for module, names in _OWNERS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
