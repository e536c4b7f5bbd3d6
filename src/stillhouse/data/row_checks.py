"""Checks rows as the data stage does, without keeping their tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from stillhouse.data.data_config import WindowsRecipe
from stillhouse.data.documents import AnyDocument, Document
from stillhouse.data.tokenize_rows import render_document, tokenize
from stillhouse.errors import DataError

_BATCH = 256


def require_rows(documents: Iterable[AnyDocument], tokenizer: Any, section: WindowsRecipe) -> None:
    """Raise DataError for the first document that the data stage would reject.

    Plain text is not tokenized, because it may be divided anywhere.
    """
    left = iter(documents)
    while batch := list(itertools.islice(left, _BATCH)):
        rows = [one for one in batch if not isinstance(one, Document)]
        for one in batch:
            if isinstance(one, Document):
                render_document(one, tokenizer, section.control_tokens)
        for row, tokens in zip(
            rows, tokenize(rows, tokenizer, section.control_tokens), strict=True
        ):
            longest = max(len(part.ids) for part in tokens)
            if longest > section.context and section.long_rows == "error":
                raise too_long(longest, row.where, section.context)


def too_long(tokens: int, where: str, context: int) -> DataError:
    """The error about a row with more tokens than the context."""
    return DataError(
        f"The row has {tokens:,} tokens, more than the context of {context:,}",
        where=where,
        fix=f"set data.context to at least {tokens}, or data.long_rows to truncate or drop",
    )
