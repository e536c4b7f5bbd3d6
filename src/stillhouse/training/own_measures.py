"""Measurements of each window of rollouts, for `metrics.jsonl`; every key begins with `own_`."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.generation.own_text import repeated_ngrams
from stillhouse.training.rollouts import Rollout


def measure_rollouts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of the answers of one window: mean length in tokens, the share that is cut off, and the share
    of 4-grams that occur earlier in the same answer."""
    count = max(1, len(rollouts))
    grams = [repeated_ngrams(one.own) for one in rollouts]
    return {
        "own_answers": len(rollouts),
        "own_length": sum(len(one.own) for one in rollouts) / count,
        "own_cut_off": sum(one.cut_off for one in rollouts) / count,
        "own_repetition": sum(n for n, _ in grams) / max(1, sum(n for _, n in grams)),
    }
