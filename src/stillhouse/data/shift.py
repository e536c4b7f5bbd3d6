"""Shifts labels: position t-1 predicts the label at t. No other module shifts them.

Shapes: R windows, L tokens, N supervised rows, D hidden width.
"""

from __future__ import annotations

from torch import Tensor, nn

IGNORED = -100
"""The label of a token that is not predicted."""


def text_end(labels_L: Tensor) -> int:
    """The number of tokens in a window up to and including the last supervised one.

    The rest is padding, or text that is not trained on.
    """
    supervised = (labels_L != IGNORED).nonzero()
    return int(supervised[-1]) + 1 if len(supervised) else 0


def predicting(labels_RL: Tensor) -> Tensor:
    """True at the positions that predict a supervised token: shape [R, L]."""
    return nn.functional.pad(labels_RL[:, 1:] != IGNORED, (0, 1))


def supervised_positions(labels_RL: Tensor) -> Tensor:
    """Flat indices of the positions that predict a supervised token, in order: shape [N].

    The shape depends on values, so this synchronizes with an accelerator; `collate` avoids that by
    computing the positions on the host.
    """
    return predicting(labels_RL).flatten().nonzero()[:, 0]


def supervised_targets(labels_RL: Tensor) -> Tensor:
    """The tokens that `supervised_positions` predict: shape [N]. Also synchronizes."""
    shifted = labels_RL[:, 1:]
    return shifted[shifted != IGNORED]


def supervised_rows(hidden_RLD: Tensor, positions_N: Tensor) -> Tensor:
    """The hidden states at the positions, in order: shape [N, D]."""
    return hidden_RLD.flatten(0, 1).index_select(0, positions_N)
