"""Tokenizes documents and computes their loss masks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.chat import RenderedChat, render_conversation
from stillhouse.data.control_tokens import CONTROL_TEXT, ControlTokens, Piece
from stillhouse.data.data_config import ControlText, WindowsRecipe
from stillhouse.data.documents import AnyDocument, Completion, Conversation, Document
from stillhouse.data.template_form import template_form
from stillhouse.errors import DataError, errors_at

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRow:
    """One row: token ids, their loss mask, and whether the row may be cut into parts.

    notes: parts of the document that are not supervised; only in the document's first row.
    """

    ids: Ids
    supervised: Mask
    splittable: bool
    notes: tuple[str, ...] = ()


def tokenize(
    documents: Sequence[AnyDocument],
    tokenizer: Any,
    control_tokens: ControlText | None = None,
) -> list[list[TokenRow]]:
    """Tokenize documents: one row each, or several for a chat whose template rewrites turns.

    Text becomes the tokenizer's prefix, then the text and EOS, which are supervised. A prompt with
    a completion becomes the prefix and the prompt, then the completion and EOS, which are
    supervised. A chat is tokenized as its template renders it, with no token added. The first token
    of a row has no context, so packing does not supervise it. control_tokens: as in a recipe's
    `data`.
    """
    eos = end_of_text(tokenizer)
    start = leading_tokens(tokenizer)
    rendered = []
    for document in documents:
        with errors_at(document.where):
            rendered.append(render_document(document, tokenizer, control_tokens))
    encoded = iter(encode_pieces([row for one in rendered for row in one.rows], tokenizer))
    rows: list[list[TokenRow]] = []
    for document, one in zip(documents, rendered, strict=True):
        text = isinstance(document, Document)
        rows.append([])
        for ids, mask in itertools.islice(encoded, len(one.rows)):
            if not isinstance(document, Conversation):
                ids, mask = _framed(ids, mask, start, eos, text, control_tokens == "tokens")
            if not mask[1:].any():
                raise DataError(
                    "0% of the row's tokens are supervised: there is nothing to train on",
                    where=document.where,
                    fix="remove the row, or fill its assistant turns",
                )
            rows[-1].append(TokenRow(ids, mask, text, () if rows[-1] else one.notes))
    return rows


def _framed(
    ids: Ids, mask: Mask, start: Ids, eos: int, text: bool, given: bool
) -> tuple[Ids, Mask]:
    """Add the tokenizer's prefix and EOS. given: the text may already contain them."""
    begins = given and np.array_equal(ids[: len(start)], start)
    before = start[:0] if begins else start
    after = [] if given and len(ids) and ids[-1] == eos else [eos]
    # The first token of a row is never a label: its mask only tells text from a prompt.
    learned = (np.arange(len(before)) == 0) & text
    ids = np.concatenate([before, ids, after]).astype(np.int32)
    return ids, np.concatenate([learned, mask, np.ones(len(after), dtype=bool)])


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
    """Return the ids and loss mask of each row; token boundaries respect the ends of the pieces.

    Pieces are tokenized separately, as at inference, where the prompt is tokenized before the first
    token is generated. A tokenizer that adds a space before every text would add one before every
    piece, so in that case complete rows are tokenized.
    """
    if adds_prefix_space(tokenizer):
        return [_encode_whole(pieces, tokenizer) for pieces in rows]
    flat = [piece for pieces in rows for piece in pieces]
    templated = iter(encode_texts([piece.text for piece in flat if not piece.plain], tokenizer))
    plain = iter(encode_texts([piece.text for piece in flat if piece.plain], tokenizer, plain=True))
    result = []
    for pieces in rows:
        parts = [np.asarray(next(plain if p.plain else templated), dtype=np.int32) for p in pieces]
        masks = [np.full(len(part), p.supervised) for part, p in zip(parts, pieces, strict=True)]
        result.append((np.concatenate(parts), np.concatenate(masks)))
    return result


def _encode_whole(pieces: Sequence[Piece], tokenizer: Any) -> tuple[Ids, Mask]:
    """Tokenize a complete row. A token that spans two pieces belongs to the first."""
    if not tokenizer.is_fast or any(piece.plain for piece in pieces):
        return _encode_apart(pieces, tokenizer)
    encoded = tokenizer(
        "".join(piece.text for piece in pieces),
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
        split_special_tokens=False,
    )
    starts = [start for start, _ in encoded["offset_mapping"]]
    ends = np.cumsum([len(piece.text) for piece in pieces])
    supervised = np.array([piece.supervised for piece in pieces])
    mask = supervised[np.searchsorted(ends, starts, side="right")]
    return np.asarray(encoded["input_ids"], dtype=np.int32), mask


def _encode_apart(pieces: Sequence[Piece], tokenizer: Any) -> tuple[Ids, Mask]:
    """Tokenize pieces one by one, without the space that the tokenizer adds before each text.

    To avoid it, every piece but the first is encoded after a newline, whose tokens are removed.
    """
    anchor = encode_texts(["\n"], tokenizer)[0]
    parts = []
    for number, piece in enumerate(pieces):
        ids = encode_texts(["\n" * (number > 0) + piece.text], tokenizer, plain=piece.plain)[0]
        parts.append(ids[len(anchor) :] if number and ids[: len(anchor)] == anchor else ids)
    masks = [np.full(len(ids), p.supervised) for ids, p in zip(parts, pieces, strict=True)]
    return np.concatenate(parts).astype(np.int32), np.concatenate(masks)


def adds_prefix_space(tokenizer: Any) -> bool:
    """Whether the tokenizer adds a space before a text without one."""
    ids = tokenizer("x", add_special_tokens=False)["input_ids"]
    token = tokenizer.convert_ids_to_tokens(ids)[0] if ids else ""
    return bool(token.startswith(("▁", "Ġ")))


def encode_texts(texts: Sequence[str], tokenizer: Any, plain: bool = False) -> list[list[int]]:
    """Return each text's token ids, without the special tokens that the tokenizer adds.

    plain: read strings of special tokens as text.
    """
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
        split_special_tokens=plain,
    )["input_ids"]


def leading_tokens(tokenizer: Any) -> Ids:
    """The tokens that the tokenizer adds before every text: usually BOS or none; [gMASK]<sop> for
    GLM. Raises DataError if they cannot be separated from the text."""
    full, bare = tokenizer("x")["input_ids"], encode_texts(["x"], tokenizer)[0]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return np.asarray(full[:start], dtype=np.int32)
    raise DataError(
        "The tokenizer encodes a text differently when it adds its special tokens",
        where=getattr(tokenizer, "name_or_path", None),
        fix="use a tokenizer that adds special tokens only before and after a text",
    )


def render_document(
    document: AnyDocument, tokenizer: Any, control_tokens: ControlText | None
) -> RenderedChat:
    """Render a document's rows as pieces, split where the supervision changes. Raises DataError."""
    if isinstance(document, Conversation):
        return render_conversation(document, tokenizer, control_tokens=control_tokens == "tokens")
    if isinstance(document, Completion):
        pieces = [Piece(document.prompt, False), Piece(document.completion, True)]
    else:
        pieces = [Piece(document.text, True)]
    pieces = [piece for piece in pieces if piece.text]
    control = template_form(tokenizer).control_tokens
    if control_tokens == "tokens" or not any(control.found(piece.text) for piece in pieces):
        return RenderedChat([pieces])
    if control_tokens is None:
        _reject_rendered(pieces, control)
    plain = [part for piece in pieces for part in control.plain(piece.text, piece.supervised)]
    return RenderedChat([plain], (CONTROL_TEXT,))


def _reject_rendered(pieces: Sequence[Piece], control: ControlTokens) -> None:
    """Raise DataError for text that seems to be rendered by a chat template."""
    for piece in pieces:
        token = control.at_an_end(piece.text)
        if token is not None:
            raise DataError(
                f"The text begins or ends with {token!r}: it seems to be rendered by a chat "
                "template, but control tokens in a text are read as plain text",
                fix="write the chat as `messages`; or set data.control_tokens: tokens to read them "
                "as tokens, or data.control_tokens: text to read them as text",
            )


# --- checks -------------------------------------------------------------------------------------


_BATCH = 256


def require_rows(documents: Iterable[AnyDocument], tokenizer: Any, section: WindowsRecipe) -> None:
    """Raise DataError for the first document that the data stage would reject.

    Plain text is not tokenized, because it can be split anywhere.
    """
    left = iter(documents)
    while batch := list(itertools.islice(left, _BATCH)):
        rows = [one for one in batch if not isinstance(one, Document)]
        for one in batch:
            if isinstance(one, Document):
                with errors_at(one.where):
                    render_document(one, tokenizer, section.control_tokens)
        for row, tokens in zip(
            rows, tokenize(rows, tokenizer, section.control_tokens), strict=True
        ):
            longest = max(len(part.ids) for part in tokens)
            if longest > section.context and section.long_rows == "error":
                raise too_long(longest, row.where, section.context)


def too_long(tokens: int, where: str, context: int) -> DataError:
    """The error for a row with more tokens than the context."""
    return DataError(
        f"The row has {tokens:,} tokens, more than the context of {context:,}",
        where=where,
        fix=f"set data.context to at least {tokens}, or data.long_rows to truncate or drop",
    )
