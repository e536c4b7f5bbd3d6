"""Recognizes answers that refuse to answer: a logistic regression over features of the answer and
the prompt.

The weights are in `refusal_weights.npz`, which `python -m bench.train_refusals` makes from the
examples of `bench/refusal_examples/`. Formula: an answer refuses if w·x + b > 0, where x are its
features, w = scale·q with whole numbers q, and b is the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np

from stillhouse.synthesis.refusal_features import features
from stillhouse.synthesis.refusal_language import clauses

SHOWN = 100
"""The most characters of the words by which an answer refuses."""


@dataclass(frozen=True)
class Weights:
    """quantized: int8, shape (BUCKETS,). A weight is scale times its whole number."""

    quantized: np.ndarray
    scale: float
    bias: float


@cache
def weights() -> Weights:
    with as_file(files("stillhouse.synthesis").joinpath("refusal_weights.npz")) as path:
        read = np.load(path)
        return Weights(read["quantized"], float(read["scale"]), float(read["bias"]))


def refusing_words(text: str, prompt: str = "") -> str | None:
    """The clause by which an answer (without its reasoning) refuses, or None.

    prompt: the user's message, if it is known; more refusals are recognized with it. The clause is
    the one with the highest score by itself, of those at the beginning.
    """
    if not text.strip() or score(text, prompt) <= 0:
        return None
    clause = max(clauses(text), key=lambda clause: score(clause, prompt), default=text)
    return clause.strip(" ,;:")[:SHOWN]


def score(text: str, prompt: str = "") -> float:
    """The log odds that an answer refuses."""
    buckets, values = features(text, prompt)
    known = weights()
    return float(known.scale * (values @ known.quantized[buckets]) + known.bias)
