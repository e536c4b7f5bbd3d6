"""A tokenizer as a code for bytes: the bytes of its tokens, and how it encodes text.

Shapes: V token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.tokenize_rows import encode_texts
from stillhouse.errors import ModelError
from stillhouse.teachers.shared_vocabulary import token_count

Ids = NDArray[np.int64]
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TextTokens:
    """A fast tokenizer's tokens that stand for bytes of text; special tokens do not.

    size: the largest id, plus 1. strings: the bytes of each text token, by id. lengths_V: the
    number of bytes of each token, 0 for other ids. special: the names of special tokens, by id.
    Raises ModelError: the tokenizer is not fast, or does not define the bytes of its tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so the bytes of its tokens "
                "are unknown",
                where=getattr(tokenizer, "name_or_path", None) or None,
                fix="save it as tokenizer.json with one of transformers' fast tokenizers",
            )
        self.tokenizer = tokenizer
        self.name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        added = tokenizer.added_tokens_decoder
        self.special = {int(id): str(token) for id, token in added.items() if token.special}
        self.size = token_count(tokenizer)
        known = token_bytes(tokenizer)
        # Sorted by id, since the order of a vocabulary's dict differs between processes.
        self.strings = {id: known[id] for id in sorted(known) if id not in self.special}
        self.lengths_V = np.zeros(self.size, dtype=np.int64)
        self.lengths_V[list(self.strings)] = [len(value) for value in self.strings.values()]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Encode each text separately. Names of special tokens in it are encoded as text."""
        rows = encode_texts(texts, self.tokenizer, plain=True)
        return [np.asarray(row, dtype=np.int64) for row in rows]

    def decode(self, ids: Sequence[int] | Ids) -> bytes:
        """The bytes of tokens that are text."""
        return b"".join([self.strings[int(id)] for id in ids])


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of every token, by id. For an added token, these are the bytes of its name.

    Supports byte-level tokenizers (such as GPT-2's), and those that write a space as ▁ and a byte
    that has no other token as <0xNN>. Raises ModelError for others.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    added = {one["id"]: one["content"].encode() for one in content.get("added_tokens", [])}
    shape = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    plain = {i: token for token, i in tokenizer.get_vocab().items() if i not in added}
    if '"ByteLevel"' in shape:
        bytes_of = byte_of_character()
        known = {i: _byte_level(token, bytes_of) for i, token in plain.items()}
    elif content.get("model", {}).get("byte_fallback"):
        known = {i: _with_fallback(token) for i, token in plain.items()}
    else:
        raise ModelError(
            f"the tokenizer ({type(tokenizer).__name__}) does not define the bytes of its tokens",
            where=getattr(tokenizer, "name_or_path", None) or None,
            fix="use a model whose tokenizer is byte-level or has byte fallback",
        )
    return {**{i: value for i, value in known.items() if value is not None}, **added}


def byte_of_character() -> dict[str, int]:
    """The byte that each character in a byte-level tokenizer's vocabulary stands for.

    Each byte is written as one visible character: a printable Latin-1 character as itself, and the
    n-th of the others as the character 256 + n.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    characters = {chr(byte): byte for byte in visible}
    return characters | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(token: str, bytes_of: dict[str, int]) -> bytes | None:
    if any(character not in bytes_of for character in token):
        return None
    return bytes(bytes_of[character] for character in token)


def _with_fallback(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
