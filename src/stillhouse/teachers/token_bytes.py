"""The bytes of each token of a tokenizer."""

from __future__ import annotations

import json
import re
from typing import Any

from stillhouse.errors import ModelError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of every token by its id; of an added token, those of its name.

    Supports byte-level tokenizers (as GPT-2's), and those that write a space as ▁ and a
    byte they have no token for as <0xNN>. Raises ModelError for others.
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
    """Byte-level tokenizers write each byte as one visible character: a printable one of Latin-1 as
    itself, the n-th of the others as the character 256 + n."""
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
