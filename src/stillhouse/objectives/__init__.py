"""What a student is trained to match, and how far it is from it.

Usable on its own with plain PyTorch: `fused_loss` takes hidden rows, an LM head and a signal.
"""

from stillhouse.objectives.features import HiddenStateLoss, layer_logits_loss
from stillhouse.objectives.fused import fused_loss
from stillhouse.objectives.layers import LayerMap, map_layers
from stillhouse.objectives.mixtures import Mixture, Schedule, Tally
from stillhouse.objectives.relation import AttentionStates, capture, relation_loss
from stillhouse.objectives.terms import PARAMETERS, LossSum, Term

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
    "fused_loss",
    "layer_logits_loss",
    "map_layers",
    "relation_loss",
]
