"""The only place where labels are shifted: position t-1 predicts the label at t."""

from __future__ import annotations

from torch import Tensor, nn

IGNORED = -100
"""The label of a token that is not predicted."""


def predicting(labels_RL: Tensor) -> Tensor:
    """True at the positions that predict a supervised token: shape [R, L]."""
    return nn.functional.pad(labels_RL[:, 1:] != IGNORED, (0, 1))


def supervised_rows(hidden_RLD: Tensor, labels_RL: Tensor) -> Tensor:
    """The hidden rows that predict a supervised token, in order: shape [N, D]."""
    return hidden_RLD[:, :-1][labels_RL[:, 1:] != IGNORED]


def supervised_targets(labels_RL: Tensor) -> Tensor:
    """The tokens that those rows predict: shape [N]."""
    shifted = labels_RL[:, 1:]
    return shifted[shifted != IGNORED]
