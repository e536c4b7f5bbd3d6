"""Converts log-probabilities of labels to the distribution that a student learns.

Shapes: N texts, K contentless texts, C labels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prior = Literal["content_free", "texts", "balanced", "none"]
_ROUNDS = 100
_LEAST = 1e-6
"""Minimum share of texts assumed for a label, when dividing by priors."""


def prior_logits(prior: Prior, train_NC: Tensor, neutral_KC: Tensor) -> Tensor:
    """The log-probability of a label regardless of the text, [C]; to be subtracted.

    content_free: the mean distribution over contentless texts (contextual calibration, Zhao et
    al. 2021, arXiv 2102.09690; as a ratio of probabilities, Holtzman et al. 2021, 2104.08315).
    texts: the mean distribution over the training texts (batch calibration, Zhou et al. 2023,
    arXiv 2309.17249). balanced: the same, repeated on its result, until every label has the same
    share of the training texts: correct only if labels are about equally frequent.
    """
    match prior:
        case "none":
            return torch.zeros(train_NC.shape[1])
        case "content_free":
            return _log_mean(neutral_KC)
        case "texts":
            return _log_mean(train_NC)
        case "balanced":
            total_C = torch.zeros(train_NC.shape[1])
            for _ in range(_ROUNDS):
                total_C = total_C + _log_mean(train_NC - total_C)
            return total_C


def distributions(scores_NC: Tensor, prior_C: Tensor) -> Tensor:
    """softmax(log p(label | text) - prior), [N, C]: proportional to their ratio."""
    return (scores_NC - prior_C).softmax(-1)


def _log_mean(scores_NC: Tensor) -> Tensor:
    return scores_NC.softmax(-1).mean(0).clamp_min(_LEAST).log()
