"""Tokenizes documents, with a loss mask.

Rows are arrays, not lists: five bytes a token, so that large text stays small in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.chat import Piece, render_conversation
from stillhouse.data.documents import AnyDocument, Completion, Conversation
from stillhouse.errors import DataError

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRow:
    """One row: token ids, which of them are supervised, and whether it may be cut into parts."""

    ids: Ids
    supervised: Mask
    splittable: bool


def tokenize(documents: Sequence[AnyDocument], tokenizer: Any) -> list[list[TokenRow]]:
    """The rows of each document (several only for a chat whose template rewrites turns).

    Text: BOS if the tokenizer adds one, the text, EOS, all supervised. Prompt and completion: BOS,
    prompt, then supervised completion and EOS. Chat: as the template renders it, with no token
    added. The first token of a row has no context; packing does not supervise it.
    """
    eos = end_of_text(tokenizer)
    start = _leading_tokens(tokenizer)
    jobs: list[tuple[int, list[Piece]]] = []
    for index, document in enumerate(documents):
        jobs += [(index, pieces) for pieces in _document_pieces(document, tokenizer)]
    encoded = encode_pieces([pieces for _, pieces in jobs], tokenizer)
    rows: list[list[TokenRow]] = [[] for _ in documents]
    for (index, _), (ids, mask) in zip(jobs, encoded, strict=True):
        document = documents[index]
        chat = isinstance(document, Conversation)
        if not chat:
            learn_start = not isinstance(document, Completion)
            ids = np.concatenate([start, ids, [eos]]).astype(np.int32)
            mask = np.concatenate([np.full(len(start), learn_start), mask, [True]])
        if not mask[1:].any():
            raise DataError(
                "0% of the row's tokens are supervised: there is nothing to train on",
                where=document.where,
                fix="remove the row, or fill its assistant turns",
            )
        splittable = not isinstance(document, (Conversation, Completion))
        rows[index].append(TokenRow(ids, mask, splittable))
    return rows


def end_of_text(tokenizer: Any) -> int:
    """The tokenizer's EOS id. Raises DataError if it has none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no end-of-text token, so documents cannot be separated",
            where=getattr(tokenizer, "name_or_path", None),
            fix="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def encode_pieces(rows: Sequence[Sequence[Piece]], tokenizer: Any) -> list[tuple[Ids, Mask]]:
    """Ids and mask of each row; token boundaries respect the ends of the pieces.

    Pieces are tokenized separately, as at inference, where the prompt is tokenized before the first
    token is generated. A tokenizer that adds a space before every text would add one before every
    piece: with it, whole rows are tokenized, and cut where the tokens of a prefix end.
    """
    if adds_prefix_space(tokenizer):
        return [_encode_whole(pieces, tokenizer) for pieces in rows]
    texts = [piece.text for pieces in rows for piece in pieces]
    encoded = iter(_encode(texts, tokenizer))
    result = []
    for pieces in rows:
        parts = [np.asarray(next(encoded), dtype=np.int32) for _ in pieces]
        masks = [np.full(len(part), p.supervised) for part, p in zip(parts, pieces, strict=True)]
        result.append((np.concatenate(parts), np.concatenate(masks)))
    return result


def _encode_whole(pieces: Sequence[Piece], tokenizer: Any) -> tuple[Ids, Mask]:
    """A token in two pieces counts as part of the first, where it begins."""
    prefixes = ["".join(p.text for p in pieces[: n + 1]) for n in range(len(pieces))]
    encoded = [np.asarray(ids, dtype=np.int32) for ids in _encode(prefixes, tokenizer)]
    ids = encoded[-1]
    mask = np.zeros(len(ids), dtype=bool)
    start = 0
    for piece, prefix in zip(pieces, encoded, strict=True):
        end = _common(prefix, ids)
        if end < len(prefix):
            end += 1
        mask[start:end] = piece.supervised
        start = max(start, end)
    return ids, mask


def _common(left: Ids, right: Ids) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


def adds_prefix_space(tokenizer: Any) -> bool:
    """Whether the tokenizer adds a space before a text without one."""
    ids = tokenizer("x", add_special_tokens=False)["input_ids"]
    token = tokenizer.convert_ids_to_tokens(ids)[0] if ids else ""
    return bool(token.startswith(("▁", "Ġ")))


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]


def _leading_tokens(tokenizer: Any) -> Ids:
    """[BOS] if the tokenizer adds one before a text, else nothing."""
    ids = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token_id
    starts = bos is not None and ids[:1] == [bos]
    return np.asarray([bos] if starts else [], dtype=np.int32)


def _document_pieces(document: AnyDocument, tokenizer: Any) -> list[list[Piece]]:
    if isinstance(document, Conversation):
        return render_conversation(document, tokenizer)
    if isinstance(document, Completion):
        pieces = [Piece(document.prompt, False), Piece(document.completion, True)]
        return [[piece for piece in pieces if piece.text]]
    return [[Piece(document.text, True)]]
