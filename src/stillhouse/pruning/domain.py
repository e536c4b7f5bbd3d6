"""Whether the calibration text is from the domain that the student will be evaluated on.

A model that is pruned on one kind of text keeps what that text needs. The full model's perplexity
distinguishes the two kinds, and so does the pruned model's KL, on unseen text of either.

Shapes: R windows of a batch, L tokens, N counted rows, D hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.windows import WindowSet
from stillhouse.pruning.calibrate import calibration_batches, products
from stillhouse.pruning.reference import Reference
from stillhouse.signals import LMHead
from stillhouse.signals.lm_head import log_probabilities, row_chunks
from stillhouse.teachers.backbone import hidden_states, lm_head

TOKENS = 2048
FOREIGN = 2.0
"""Ratio of the full model's perplexities on both texts, or of the pruned model's KL on the held-out
text to that on text like the calibration text, above which the domains count as different."""
LEAST_KL = 0.01
"""Nats/token below which a cut costs too little for the ratio to be meaningful."""


@dataclass(frozen=True)
class Reading:
    """What the full model computes on some text, and its perplexity there."""

    reference: Reference
    perplexity: float


@dataclass(frozen=True)
class Domain:
    """The full model's perplexities; heldout_kl: KL(full ‖ pruned) in nats/token, or None;
    unseen_kl: on training text that was not calibrated on, None if there is none."""

    calibration_perplexity: float
    heldout_perplexity: float
    heldout_kl: float | None
    unseen_kl: float | None = None

    def warning(self) -> str | None:
        """A warning if calibration and held-out text are from different domains."""
        both = (self.calibration_perplexity, self.heldout_perplexity)
        kl, own = self.heldout_kl, self.unseen_kl
        if max(both) < FOREIGN * min(both):
            if kl is None or own is None or kl < max(FOREIGN * own, LEAST_KL):
                return None
            return (
                f"the cut costs KL {own:.3f} on text like the calibration text, and {kl:.3f} on "
                "the held-out text, which seems to be of another domain. Add training text of that "
                "domain"
            )
        cost = "" if kl is None else f"; on the latter the cut costs KL {kl:.3f}"
        return (
            "the calibration text is of another domain than the held-out text: the teacher's "
            f"perplexity is {both[0]:.1f} on it and {both[1]:.1f} there{cost}. Add training text "
            "of that domain"
        )


@torch.no_grad()
def read_text(model: Any, windows: WindowSet, seed: int, dtype: torch.dtype) -> Reading:
    """Run the model over about TOKENS tokens."""
    batches = calibration_batches(windows, TOKENS, seed, model.device)
    head, rows, loss, count = lm_head(model), [], 0.0, 0
    with products(model, dtype):
        for batch in batches:
            hidden_RLD = hidden_states(model, batch.input_ids_RL, batch.position_ids_RL).float()
            rows.append(hidden_RLD[batch.counted_RL])
            follows_RL = batch.counted_RL[:, 1:] & (batch.position_ids_RL[:, 1:] > 0)
            targets_N = batch.input_ids_RL[:, 1:][follows_RL]
            loss += _cross_entropy(head, hidden_RLD[:, :-1][follows_RL], targets_N)
            count += len(targets_N)
    perplexity = math.exp(min(loss / max(count, 1), 700.0))
    return Reading(Reference(batches, rows, head), perplexity)


def _cross_entropy(head: LMHead, rows_ND: Tensor, targets_N: Tensor) -> float:
    total = 0.0
    for chunk in row_chunks(head, len(rows_ND)):
        log_p_nV = log_probabilities(head, rows_ND[chunk])
        total -= log_p_nV.gather(1, targets_N[chunk, None]).sum().item()
    return total
