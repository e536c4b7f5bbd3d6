"""Check whether each training of a run brought the student closer to its teacher."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse import number_format as text
from stillhouse.evaluation.results import ModelResult

_TRAININGS = (
    ("untrained", "student", "training", "train.learning_rate", "data.train_tokens"),
    (
        "quantized",
        "quantized_trained",
        "training with quantized weights",
        "quantize.qat.learning_rate",
        "quantize.qat.tokens",
    ),
)
"""For each training: the roles before and after it, its name, and the keys to change if it does
harm."""


def farther_after_training(models: Sequence[ModelResult]) -> list[str]:
    """A sentence for each training that did not lower the KL on held-out text."""
    kl = {model.role: model.fidelity.kl for model in models}
    return [
        f"The student is no closer to the teacher after {name}: KL on held-out text is "
        f"{text.tiny(kl[after])} nats/token, compared with {text.tiny(kl[before])} before. Lower "
        f"{rate}, or train on more text ({amount})."
        for before, after, name, rate, amount in _TRAININGS
        if before in kl and after in kl and kl[after] >= kl[before]
    ]
