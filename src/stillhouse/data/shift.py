"""The only place where labels are shifted: position t-1 predicts the label at t.

Shapes: R windows, L tokens, N supervised rows, D hidden width.
"""

from __future__ import annotations

from torch import Tensor, nn

IGNORED = -100
"""The label of a token that is not predicted."""


def text_end(labels_L: Tensor) -> int:
    """The number of a window's tokens up to its last supervised one: what follows is padding, or
    text that is not trained on."""
    supervised = (labels_L != IGNORED).nonzero()
    return int(supervised[-1]) + 1 if len(supervised) else 0


def predicting(labels_RL: Tensor) -> Tensor:
    """True at the positions that predict a supervised token: shape [R, L]."""
    return nn.functional.pad(labels_RL[:, 1:] != IGNORED, (0, 1))


def supervised_positions(labels_RL: Tensor) -> Tensor:
    """The positions that predict a supervised token, counted over all windows in order: shape [N].

    Their number depends on values, so on an accelerator this waits for the device: `collate`
    computes them on the host.
    """
    return predicting(labels_RL).flatten().nonzero()[:, 0]


def supervised_targets(labels_RL: Tensor) -> Tensor:
    """The tokens that those positions predict: shape [N]. It waits for the device too."""
    shifted = labels_RL[:, 1:]
    return shifted[shifted != IGNORED]


def supervised_rows(hidden_RLD: Tensor, positions_N: Tensor) -> Tensor:
    """The hidden rows at the positions, in order: shape [N, D]."""
    return hidden_RLD.flatten(0, 1).index_select(0, positions_N)
