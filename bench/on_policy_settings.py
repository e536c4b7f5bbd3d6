"""The settings of bench.on_policy, and the bars between them."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.common import Bar

MAX_TOKENS = 96
"""Of an answer in training."""
SETTINGS: dict[str, dict[str, Any] | None] = {
    "teacher_chats": None,
    "student_chats": None,
    "reverse_kl": {"share": 1.0, "terms": [{"divergence": "reverse_kl"}]},
    "jsd": {"share": 1.0, "terms": [{"divergence": "jsd"}]},
    "both_kl": {
        "share": 1.0,
        "terms": [{"divergence": "reverse_kl"}, {"divergence": "forward_kl"}],
    },
    "half": {"share": 0.5, "terms": [{"divergence": "reverse_kl"}]},
}
"""Each one's `train.on_policy`; None: no own text."""
WARMUP = 0.05
"""The share of a training's tokens in which the learning rate rises, if it falls later."""
DRAWS = 2000
"""Draws of prompts for an interval."""


@dataclass(frozen=True)
class Training:
    """What all settings that are compared have in common.

    tokens: supervised ones. decay: the share of them, at the end, in which the learning rate falls
    to 0 along a cosine; 0 keeps it constant.
    """

    tokens: int
    learning_rate: float
    decay: float

    def rate(self, done: int) -> float:
        """The learning rate after `done` tokens."""
        if self.decay == 0:
            return self.learning_rate
        share = min(1.0, done / self.tokens)
        fallen = max(0.0, share - (1 - self.decay)) / self.decay
        # The first step has a rate above 0.
        rise = min(1.0, (share + WARMUP / 5) / WARMUP)
        return self.learning_rate * rise * (1 + math.cos(math.pi * fallen)) / 2


TRAINING = tuple(Training.__dataclass_fields__)


def parts_of(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A setting's name without changes, its changes of `train.on_policy`, and of the training."""
    base, *changes = name.split("@")
    pairs = [change.partition("=") for change in changes]
    given = {key: json.loads(value) for key, _, value in pairs}
    training = {key: given.pop(key) for key in TRAINING if key in given}
    return base, given, training


def own_text(base: str, changes: dict[str, Any]) -> dict[str, Any] | None:
    """A setting's `train.on_policy`. Changes of a divergence's parameters go to its first term."""
    own = SETTINGS[base]
    if own is None:
        return None
    parameters = {key: changes[key] for key in ("alpha", "beta", "mu") if key in changes}
    others = {key: value for key, value in changes.items() if key not in parameters}
    first, *more = own["terms"]
    own = {**own, "terms": [{**first, **parameters}, *more]}
    return {"max_tokens": MAX_TOKENS, "window": 4, **own, **others}


Seeds = dict[str, dict[str, Any]]
"""The figures of a setting with each seed."""


def pairs_of(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, Seeds, Seeds]]:
    """A width, a setting on own text and (a) of the same training, with the figures of both for the
    setting's seeds, if (a) has them too.

    found: figures of each width, seed and setting, as `WIDTH-SEED/SETTING`.
    """
    for width in sorted({name.partition("-")[0] for name in found}):
        settings: dict[str, Seeds] = {}
        for name, figures in found.items():
            student, _, setting = name.partition("/")
            if student.startswith(f"{width}-"):
                settings.setdefault(setting, {})[student] = figures
        bases = {
            json.dumps(parts_of(name)[2], sort_keys=True): name
            for name in settings
            if name.partition("@")[0] == "teacher_chats"
        }
        for name, own in settings.items():
            kind, _, training = parts_of(name)
            base = bases.get(json.dumps(training, sort_keys=True))
            if SETTINGS.get(kind) and base and own.keys() <= settings[base].keys():
                yield width, name, base, own, {seed: settings[base][seed] for seed in own}


def bars_of(found: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """found: as in `pairs_of`. The best setting of a width, among those with the most seeds, has
    the lowest KL on own text, in relation to that of (a)."""
    pairs = list(pairs_of(found))
    for width in sorted({pair[0] for pair in pairs}):
        _, name, base_name, own, base = min(
            (pair for pair in pairs if pair[0] == width),
            key=lambda pair: (-len(pair[3]), ratio(pair[3], pair[4], "sampled", "reverse_kl")),
        )
        label = f"width {width}, {name} against {base_name}, {len(base)} seeds: "
        repetition = ratio(own, base, "greedy", "repetition")
        yield Bar(f"{label}repetition, ratio", repetition, "<=", 0.5)
        own_kl = ratio(own, base, "sampled", "reverse_kl")
        yield Bar(f"{label}KL on own text, ratio", own_kl, "<=", 0.7)
        gain = more(own, base, "greedy", "teacher_logprob")
        yield Bar(f"{label}log-probability by the teacher, difference", gain, ">=", 0.0)
        worse = more(own, base, "heldout", "kl")
        yield Bar(f"{label}held-out KL, difference", worse, "<=", 0.02)


Counts = list[tuple[int, int]]
"""Repeated 4-grams of each answer, and all."""


def repetition_interval(own: list[Counts], base: list[Counts]) -> tuple[float, float]:
    """95% of the ratio of repetition, means over seeds, when prompts are drawn with replacement.

    own, base: of each seed, answers to the same prompts.
    """
    chance, prompts = random.Random(0), range(len(own[0]))
    ratios = []
    for _ in range(DRAWS):
        drawn = chance.choices(prompts, k=len(prompts))
        ratios.append(_repetition(own, drawn) / max(1e-12, _repetition(base, drawn)))
    ratios.sort()
    return ratios[DRAWS // 40], ratios[-1 - DRAWS // 40]


def _repetition(seeds: list[Counts], drawn: list[int]) -> float:
    shares = []
    for counts in seeds:
        repeated = sum(counts[answer][0] for answer in drawn)
        shares.append(repeated / max(1, sum(counts[answer][1] for answer in drawn)))
    return statistics.fmean(shares)


def ratio(own: Seeds, base: Seeds, *path: str) -> float:
    return _mean(own, *path) / max(1e-12, _mean(base, *path))


def more(own: Seeds, base: Seeds, *path: str) -> float:
    return _mean(own, *path) - _mean(base, *path)


def _mean(figures: Seeds, *path: str) -> float:
    values = []
    for found in figures.values():
        value: Any = found
        for key in path:
            value = value[key]
        values.append(float(value))
    return statistics.fmean(values)
