"""Measurements of each window of rollouts, for `metrics.jsonl`; every key begins with `own_`."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.training.rollouts import Rollout


def measure_rollouts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of the answers of one window: mean length in tokens, and the share that is cut off."""
    count = max(1, len(rollouts))
    return {
        "own_answers": len(rollouts),
        "own_length": sum(len(one.own) for one in rollouts) / count,
        "own_cut_off": sum(one.cut_off for one in rollouts) / count,
    }
