"""Reference outputs of a model on some text, and other models' KL to them.

They also show whether the calibration text is from the domain that the student will be evaluated
on. Pruning on one kind of text keeps the parts that this text needs. A different domain shows in
the full model's perplexity on the two texts, and in the pruned model's KL on unseen text of each
kind.

Shapes: R windows of a batch, L tokens, N counted rows, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.windows import WindowSet
from stillhouse.pruning.calibrate import Batch, calibration_batches, products
from stillhouse.signals import LMHead
from stillhouse.signals.lm_head import log_probabilities, row_chunks, summed_kl
from stillhouse.teachers.backbone import hidden_states, lm_head, trim_head

DOMAIN_TOKENS = 2048
FOREIGN = 2.0
"""The domains count as different from this ratio on: of the full model's perplexities on both
texts, or of the pruned model's KL on held-out text to its KL on text like the calibration text."""
LEAST_KL = 0.01
"""In nats/token: below this, a cut costs too little for the ratio of KLs to be meaningful."""


@dataclass(frozen=True)
class Reference:
    """A model's last hidden rows [N, D] for every batch, and its head.

    vocabulary: number of head rows that are tokens of both models; None: all.
    """

    batches: Sequence[Batch]
    rows: list[Tensor]
    head: LMHead
    vocabulary: int | None = None


def rows_of(model: Any, batch: Batch) -> Tensor:
    """The last hidden states at the counted positions, [N, D]."""
    return hidden_states(model, batch.input_ids_RL, batch.position_ids_RL)[batch.counted_RL]


@torch.no_grad()
def reference_on(
    model: Any, batches: Sequence[Batch], dtype: torch.dtype, vocabulary: int | None = None
) -> Reference:
    """Run the model over the batches. The head is the model's own, not a copy."""
    with products(model, dtype):
        rows = [rows_of(model, batch).float() for batch in batches]
    return Reference(batches, rows, trim_head(lm_head(model), vocabulary), vocabulary)


@torch.no_grad()
def mean_kl(reference: Reference, model: Any, dtype: torch.dtype) -> float:
    """KL(reference ‖ model) in nats/token."""
    total, count = 0.0, 0
    head = trim_head(lm_head(model), reference.vocabulary)
    with products(model, dtype):
        for batch, full_ND in zip(reference.batches, reference.rows, strict=True):
            own_ND = rows_of(model, batch).float()
            total += summed_kl(reference.head, full_ND, [own_ND], head)[0]
            count += len(full_ND)
    return total / max(count, 1)


@dataclass(frozen=True)
class Domain:
    """The full model's perplexities on calibration and held-out text, and the pruned model's KL.

    heldout_kl: KL(full ‖ pruned) on the held-out text in nats/token; None if not measured.
    unseen_kl: the same on training text that was not used for calibration; None if there is none.
    """

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
                f"the cut costs KL {own:.3f} on text like the calibration text, but {kl:.3f} on "
                "the held-out text, which seems to be from a different domain. Add training text "
                "from that domain"
            )
        cost = "" if kl is None else f". On held-out text, the cut costs KL {kl:.3f}"
        return (
            "the held-out text seems to be from a different domain than the calibration text: the "
            f"teacher's perplexity is {both[1]:.1f} on held-out text and {both[0]:.1f} on "
            f"calibration text{cost}. Add training text from the held-out text's domain"
        )


@torch.no_grad()
def read_text(
    model: Any, windows: WindowSet, seed: int, dtype: torch.dtype
) -> tuple[Reference, float]:
    """The model's outputs and perplexity on about DOMAIN_TOKENS tokens."""
    batches = calibration_batches(windows, DOMAIN_TOKENS, seed, model.device)
    head, rows, loss, count = lm_head(model), [], 0.0, 0
    with products(model, dtype):
        for batch in batches:
            hidden_RLD = hidden_states(model, batch.input_ids_RL, batch.position_ids_RL).float()
            rows.append(hidden_RLD[batch.counted_RL])
            follows_RL = batch.counted_RL[:, 1:] & (batch.position_ids_RL[:, 1:] > 0)
            targets_N = batch.input_ids_RL[:, 1:][follows_RL]
            loss += _cross_entropy(head, hidden_RLD[:, :-1][follows_RL], targets_N)
            count += len(targets_N)
    return Reference(batches, rows, head), math.exp(min(loss / max(count, 1), 700.0))


def _cross_entropy(head: LMHead, rows_ND: Tensor, targets_N: Tensor) -> float:
    total = 0.0
    for chunk in row_chunks(head, len(rows_ND)):
        log_p_nV = log_probabilities(head, rows_ND[chunk])
        total -= log_p_nV.gather(1, targets_N[chunk, None]).sum().item()
    return total
