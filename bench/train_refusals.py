"""Train the refusal classifier and write its weights: python -m bench.train_refusals

Reads the examples in `bench/refusal_examples/`. Each example with a prompt is repeated without it,
at half the weight; refusals and answers have the same total weight. The objective is the mean
logistic loss plus L2·|w|²/2, minimized by gradient descent with momentum. There is no randomness
and sums have a fixed order, so the file is reproduced bit for bit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stillhouse.synthesis import refusals
from stillhouse.synthesis.refusals import BUCKETS, features

EXAMPLES = Path(__file__).parent / "refusal_examples"
WEIGHTS = Path(refusals.__file__).with_name("refusal_weights.npz")
L2, RATE, MOMENTUM, STEPS = 3e-5, 8.0, 0.9, 250
FEWEST, KEPT = 2, 20_000
"""Minimum number of examples with a feature, and number of features that are kept."""
PROMPTLESS = 12
"""Minimum length of answers that are repeated without their prompt; short ones depend on it."""


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str
    refusal: bool
    family: str
    language: str


def examples(path: Path) -> list[Example]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Example(**json.loads(line)) for line in lines if line]


def trained(rows: Sequence[Example]) -> refusals.Weights:
    """Train a classifier, train it again with only the KEPT most important features, and return its
    quantized weights."""
    design = _design(rows)
    w, _ = _fitted(design)
    kept = np.argsort(-np.abs(w), kind="stable")[:KEPT]
    only = np.isin(design.buckets, kept)
    w, bias = _fitted(replace(
        design, buckets=design.buckets[only], values=design.values[only], row=design.row[only]
    ))  # fmt: skip
    scale = float(np.abs(w).max() / 127)
    return refusals.Weights(np.round(w / scale).astype(np.int8), scale, bias)


@dataclass(frozen=True)
class _Design:
    """A sparse matrix. buckets, values, row: its entries, each of shape (entries,). target, weight:
    its rows, each of shape (rows,)."""

    buckets: np.ndarray
    values: np.ndarray
    row: np.ndarray
    target: np.ndarray
    weight: np.ndarray


def _design(rows: Sequence[Example]) -> _Design:
    """Return the features that occur in at least FEWEST examples."""
    texts = [(row.answer, row.prompt, row.refusal, 1.0) for row in rows]
    seen = np.zeros(BUCKETS)
    found = [features(text, prompt) for text, prompt, _, _ in texts]
    for buckets, _ in found:
        seen[np.unique(buckets)] += 1
    promptless = [
        (row.answer, "", row.refusal, 0.5)
        for row in rows
        if row.prompt and len(row.answer) > PROMPTLESS
    ]
    found += [features(text, prompt) for text, prompt, _, _ in promptless]
    texts += promptless
    buckets = np.concatenate([part for part, _ in found])
    values = np.concatenate([part for _, part in found])
    row = np.repeat(np.arange(len(found)), [len(part) for part, _ in found])
    target = np.array([float(refusal) for _, _, refusal, _ in texts])
    weight = np.array([weight for _, _, _, weight in texts])
    for kind in (0.0, 1.0):
        weight[target == kind] /= 2 * weight[target == kind].sum()
    often = seen[buckets] >= FEWEST
    return _Design(buckets[often], values[often], row[often], target, weight)


def _fitted(design: _Design) -> tuple[np.ndarray, float]:
    """Return weights of shape (BUCKETS,) and the bias."""
    known, columns = np.unique(design.buckets, return_inverse=True)
    w, bias = np.zeros(len(known)), 0.0
    speed, bias_speed = np.zeros(len(known)), 0.0
    for _ in range(STEPS):
        ahead, bias_ahead = w + MOMENTUM * speed, bias + MOMENTUM * bias_speed
        scores = np.bincount(design.row, design.values * ahead[columns], len(design.target))
        error = design.weight * (1 / (1 + np.exp(-scores - bias_ahead)) - design.target)
        slope = np.bincount(columns, design.values * error[design.row], len(known)) + L2 * ahead
        speed = MOMENTUM * speed - RATE * slope
        bias_speed = MOMENTUM * bias_speed - 0.1 * RATE * float(error.sum())
        w, bias = w + speed, bias + bias_speed
    complete = np.zeros(BUCKETS)
    complete[known] = w
    return complete, bias


def write(weights: refusals.Weights, path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(
            file, quantized=weights.quantized, scale=weights.scale, bias=weights.bias
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    path = parser.parse_args().out
    rows = [row for file in sorted(EXAMPLES.glob("*.jsonl")) for row in examples(file)]
    refused = sum(row.refusal for row in rows)
    print(f"{refused:,} refusals, {len(rows) - refused:,} answers")
    write(trained(rows), path)
    print(f"wrote {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
