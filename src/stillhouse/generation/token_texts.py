"""The text of each token of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the decoded text, special tokens included.

    A character of several tokens belongs to the last of them, and the others are empty.
    """
    texts: list[str] = []
    start = shown = 0  # tokens from `start` are decoded together, those up to `shown` are in texts
    for end in range(1, len(ids) + 1):
        before, now = (_decode(tokenizer, ids[start:stop]) for stop in (shown, end))
        if now.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, shown = shown, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
