"""Replay an exported classifier in a process without Stillhouse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.export.fresh_process import run_script


@dataclass(frozen=True)
class ClassifierRows:
    """The inputs of a classifier's replay.

    rows: each text's token ids; for a language model, of the complete prompt.
    texts: the texts of rows that consist of only a text, to tokenize them again; None for others.
    mean_pooling: whether the head reads the mean of the last hidden states.
    labels: for a language model, each label's tokens.
    prior: for a language model, the values subtracted from the labels' log-probabilities.
    """

    rows: Sequence[Sequence[int]]
    texts: Sequence[str | None]
    mean_pooling: bool = False
    labels: Sequence[Sequence[int]] | None = None
    prior: Sequence[float] | None = None


def replay_classifier(exported: Path, inputs: ClassifierRows) -> Tensor:
    """Compute the labels' probabilities [N, C] with only transformers, in float32, one text at a
    time.

    Raises ModelError if the folder does not load, its weights are not the model's, or its tokenizer
    tokenizes a text differently.
    """
    found = run_script(
        "replay_classifier.py",
        {"exported": str(exported.resolve()), **asdict(inputs)},
        offline=True,
        what="the exported classifier cannot be loaded and run again",
        where=exported,
        fix="check that transformers can load this model without Stillhouse",
    )
    if found["problems"]:
        raise ModelError(
            f"the exported folder does not match the classifier: {'; '.join(found['problems'])}",
            where=exported,
            fix="run the same command again; if that does not help, check the disk",
        )
    logits_NC: Tensor = found["logits"]
    return logits_NC.float().softmax(-1)
