"""The bytes of held-out text, for a measure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from typing import Any

from stillhouse.data.shift import supervised_targets
from stillhouse.data.windows import WindowSet
from stillhouse.errors import ModelError
from stillhouse.evaluation.results import Fidelity
from stillhouse.teachers.text_tokens import TextTokens


def supervised_bytes(tokenizer: Any, windows: WindowSet) -> int | None:
    """Bytes of the tokens that are predicted, without special tokens; None if the tokenizer does
    not define the bytes of its tokens."""
    try:
        lengths_V = TextTokens(tokenizer).lengths_V
    except ModelError:
        return None
    total = 0
    for index in range(len(windows)):
        targets_N = supervised_targets(windows[index]["labels"][None]).numpy()
        total += int(lengths_V[targets_N[targets_N < len(lengths_V)]].sum())
    return total


def bits_per_byte(fidelity: Fidelity, size: int | None) -> float | None:
    """Negative log-likelihood of the text in bits, ends of documents and turns included, divided by
    its bytes."""
    return math.log2(fidelity.perplexity) * fidelity.tokens / size if size else None
