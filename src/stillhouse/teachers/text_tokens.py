"""A tokenizer as a code for bytes: which tokens are text, and how a text is encoded.

Shapes: V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.tokenize_rows import encode_texts
from stillhouse.errors import ModelError
from stillhouse.teachers.token_bytes import token_bytes

Ids = NDArray[np.int64]


class TextTokens:
    """The tokens of a fast tokenizer that stand for bytes of a text; special tokens do not.

    size: ids are below it. strings: the bytes of each token that is text, by id. lengths_V: their
    numbers, 0 for other ids. special: the names of special tokens, by id.
    Raises ModelError: the tokenizer is not fast, or does not define the bytes of its tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so the bytes of its tokens "
                "are unknown",
                where=getattr(tokenizer, "name_or_path", None) or None,
                fix="save it as tokenizer.json, with a fast tokenizer of transformers",
            )
        self.tokenizer = tokenizer
        self.name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        added = tokenizer.added_tokens_decoder
        self.special = {int(id): str(token) for id, token in added.items() if token.special}
        self.size = int(max(tokenizer.get_vocab().values())) + 1
        known = token_bytes(tokenizer)
        # In the order of ids: that of a vocabulary's dict changes from process to process.
        self.strings = {id: known[id] for id in sorted(known) if id not in self.special}
        self.lengths_V = np.zeros(self.size, dtype=np.int64)
        self.lengths_V[list(self.strings)] = [len(value) for value in self.strings.values()]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text, alone; strings of special tokens are text."""
        rows = encode_texts(texts, self.tokenizer, plain=True)
        return [np.asarray(row, dtype=np.int64) for row in rows]

    def decode(self, ids: Sequence[int] | Ids) -> bytes:
        """The bytes of tokens that are text."""
        return b"".join([self.strings[int(id)] for id in ids])
