"""Replays a classifier's folder in a process without Stillhouse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.export.fresh_process import offline, run_script


@dataclass(frozen=True)
class ClassifierRows:
    """The inputs of a classifier's replay.

    rows: token ids of each text, or, for a language model, its complete prompt. texts: of rows that
    are only a text, to be tokenized again. mean_pooling: the head reads the mean of the last
    states. labels, prior: for a language model, each label's tokens, and the values subtracted from
    their log-probabilities.
    """

    rows: Sequence[Sequence[int]]
    texts: Sequence[str | None]
    mean_pooling: bool = False
    labels: Sequence[Sequence[int]] | None = None
    prior: Sequence[float] | None = None


def replay_classifier(exported: Path, inputs: ClassifierRows) -> Tensor:
    """Probabilities [N, C] of the labels, using only transformers, in float32, one text at a time.

    Raises ModelError if the folder does not load, its weights are not the model's, or its tokenizer
    tokenizes a text differently.
    """
    found = run_script(
        "replay_classifier.py",
        {"exported": str(exported.resolve()), **asdict(inputs)},
        env=offline(),
        what="the exported classifier cannot be loaded and run again",
        where=exported,
        fix="check that transformers alone can load this model",
    )
    if found["problems"]:
        raise ModelError(
            f"the exported folder is not the classifier: {'; '.join(found['problems'])}",
            where=exported,
            fix="the disk may be damaged: run the same command again",
        )
    logits_NC: Tensor = found["logits"]
    return logits_NC.float().softmax(-1)
