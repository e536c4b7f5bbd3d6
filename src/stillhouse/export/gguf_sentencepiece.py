"""SentencePiece-like BPE (on characters, with tokens for single bytes) as GGUF metadata.

For these tokenizers, llama.cpp does not use merges. It joins any two neighbors whose text is a
token, highest score first, and adds a space before the text if the file says so. So the later a
token's merge, the lower its score, and a tokenizer is rejected if its merges omit a pair that
llama.cpp would join.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf

from stillhouse.export.gguf_model import unknown_tokenizer
from stillhouse.teachers.gguf_families import Family

SPACE = "▁"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece-like tokenizer.

    ids: each token's id, without added tokens.
    ranks: rank of the first merge that creates each token.
    prefix: which rule adds a space before text. "Prepend": before each segment between special
        tokens; "always" (Metaspace): the same, unless there is one already; "first" (Metaspace):
        only before the first segment, unless there is one already; None: no rule.
    """

    ids: dict[str, int]
    ranks: dict[str, int]
    prefix: str | None


def pieces_of(state: dict[str, Any]) -> Pieces:
    """Read the tokenizer. state: the contents of tokenizer.json.

    Raises ModelError if llama.cpp would tokenize differently.
    """
    model = state["model"]
    pairs = [tuple(pair) for pair in model["merges"]]
    added = {token["content"] for token in state["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    pieces = Pieces(model["vocab"], ranks, _prefix(state))
    if model.get("ignore_merges"):
        raise unknown_tokenizer("with byte fallback that ignore merges")
    lacking = [token for token in BYTES if token not in pieces.ids]
    if lacking:
        raise unknown_tokenizer(f"with byte fallback but without the token {lacking[0]}")
    missing = next(_missing_pairs(pieces, set(pairs), added), None)
    if missing is not None:
        raise unknown_tokenizer(
            f"with byte fallback that never merge {missing[0]!r} and {missing[1]!r}, which "
            "llama.cpp would merge"
        )
    return pieces


def _prefix(state: dict[str, Any]) -> str | None:
    """Which rule adds a space before text. Raises ModelError for rules that llama.cpp does not
    have."""
    steps = _steps(state["normalizer"], "normalizers")
    parts = _steps(state["pre_tokenizer"], "pretokenizers")
    prefix, spaces = None, False
    for step in steps:
        if step == {"type": "Prepend", "prepend": SPACE} and not spaces:
            prefix = "Prepend"
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            spaces = True
        else:
            raise unknown_tokenizer(f"with byte fallback and the normalizer {step['type']}")
    for part in parts:
        if part["type"] == "Metaspace" and part["replacement"] == SPACE and not part["split"]:
            scheme, spaces = part["prepend_scheme"], True
            prefix = prefix if scheme == "never" else scheme
        elif not (part["type"] == "Split" and part["pattern"] == {"String": " "} and spaces):
            # Splitting at spaces has no effect if there are none left.
            raise unknown_tokenizer(f"with byte fallback that split text by {part['type']}")
    if not spaces:
        raise unknown_tokenizer(f"with byte fallback that do not write a space as {SPACE}")
    return prefix


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _missing_pairs(
    pieces: Pieces, pairs: set[tuple[str, ...]], added: set[str]
) -> Iterator[tuple[str, str]]:
    """Yield pairs of neighbors that are never merged although they form a token.

    A neighbor is a single character, whether or not it is a token, or the result of a merge.
    """
    for token in pieces.ids:
        if token in added or token in BYTES:
            continue
        for place in range(1, len(token)):
            pair = token[:place], token[place:]
            if pair not in pairs and all(len(half) == 1 or half in pieces.ranks for half in pair):
                yield pair


def add_pieces(writer: gguf.GGUFWriter, pieces: Pieces, tokenizer: Any, rows: int) -> None:
    """Write the tokens. rows: see `add_tokenizer`."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, scores, kinds = [], [], []
    for index in range(rows):
        token = by_id.get(index, f"[PAD{index}]")
        kind = _kind(index, token, tokenizer, index in by_id, added.get(index))
        if kind == gguf.TokenType.USER_DEFINED and added[index].normalized:
            token = token.replace(SPACE, " ")  # It is matched in the original text.
        tokens.append(token)
        scores.append(-float(pieces.ranks.get(token, len(pieces.ranks))))
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(pieces.prefix is not None and not _for_chats(pieces, tokenizer))


def _for_chats(pieces: Pieces, tokenizer: Any) -> bool:
    """Whether to write the file for chats, without spaces before text.

    llama.cpp adds a space before every segment between special tokens, or before none. A tokenizer
    that only adds one before the first segment adds none to a chat, which begins with a special
    token.
    """
    return pieces.prefix == "first" and bool(tokenizer.chat_template)


def read_otherwise_by_llama_cpp(held: object, tokenizer: Any) -> str | None:
    """A note on texts that llama.cpp tokenizes differently; None if there are none. held: see
    `tokenizer_in_gguf`."""
    if not (isinstance(held, Pieces) and _for_chats(held, tokenizer)):
        return None
    return (
        "llama.cpp adds a space before every segment of text or before none: the file is written "
        "for chats, so prompts without the chat template lack the space before them"
    )


def _kind(index: int, token: str, tokenizer: Any, known: bool, added: Any) -> gguf.TokenType:
    if not known:
        return gguf.TokenType.UNUSED
    if index == tokenizer.unk_token_id:
        return gguf.TokenType.UNKNOWN
    if token in BYTES:
        return gguf.TokenType.BYTE
    if added is None:
        return gguf.TokenType.NORMAL
    if added.special:
        return gguf.TokenType.CONTROL
    # A token with ▁ that is matched in text without ▁ can only result from merges.
    spelled = SPACE in token and not added.normalized
    return gguf.TokenType.NORMAL if spelled else gguf.TokenType.USER_DEFINED


def pieces_otherwise_by_transformers(pieces: Pieces, family: Family) -> str | None:
    """A note on texts that transformers' GGUF loader tokenizes differently; None if there are none.

    The loader reads the tokenizer of a Gemma file as Gemma's, and any other as Llama's, with a
    space before the first text.
    """
    if family.norm_offset:
        expected: tuple[str | None, ...] = (None,)
    else:
        expected = ("first", "always", "Prepend")
    if pieces.prefix in expected:
        return None
    puts = "no space" if family.norm_offset else "a space"
    return (
        f"transformers' GGUF loader adds {puts} before a text, unlike the tokenizer: use the file "
        "in llama.cpp, or with the checkpoint's own tokenizer; the prompts' tokens were not "
        "compared in transformers"
    )
