"""What a student is trained to match, and how far it is from it.

Usable on its own with plain PyTorch: `fused_loss` takes hidden rows, an LM head and a signal.
"""

from stillhouse.objectives.fused import fused_loss
from stillhouse.objectives.terms import LossSum, Term

__all__ = ["LossSum", "Term", "fused_loss"]
