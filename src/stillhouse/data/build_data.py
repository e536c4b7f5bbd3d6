"""Builds windows of tokens from sources: read, tokenize, split, pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse import progress
from stillhouse.data.data_config import DataRecipe, Source, WindowsRecipe
from stillhouse.data.documents import AnyDocument, Completion, Document, content_hash, group_hash
from stillhouse.data.packing import fill_windows, plan_isolated, plan_single
from stillhouse.data.row_pool import Pool
from stillhouse.data.sources import read_sources, size_estimate
from stillhouse.data.split import Taken, check_split, divide
from stillhouse.data.tokenize_rows import TokenRow, end_of_text, tokenize
from stillhouse.data.windows import Windows, write_windows
from stillhouse.errors import DataError

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1_000_000
"""Documents are tokenized together up to either limit: tokenizers use all cores for a batch."""

_MOST_NOTES = 12


@dataclass(frozen=True)
class Texts:
    """Documents to read once. characters: their approximate number, for a progress bar."""

    documents: Iterable[AnyDocument]
    characters: int = 0

    @classmethod
    def of_sources(cls, sources: Sequence[Source], base: Path) -> Texts:
        return cls(read_sources(sources, base), size_estimate(sources, base))


def build(
    section: DataRecipe, tokenizer: Any, *, seed: int, base: Path, out: Path
) -> tuple[Windows, Windows]:
    """Training and held-out windows of a recipe's sources, in out/train and out/heldout.

    base: the folder that relative paths start from. Raises DataError as `make_windows`.
    """
    heldout = Texts.of_sources(section.heldout_sources, base) if section.heldout_sources else None
    texts = Texts.of_sources(section.sources, base)
    return make_windows(texts, heldout, tokenizer, section, seed=seed, out=out)


def make_windows(
    texts: Texts,
    heldout: Texts | None,
    tokenizer: Any,
    section: WindowsRecipe,
    *,
    seed: int = 0,
    out: Path | None = None,
) -> tuple[Windows, Windows]:
    """Tokenize, divide and pack text: training and held-out windows.

    heldout: text of its own; None: documents of `texts` are split off. out: a folder for both; None
    keeps them in memory. The result depends on the seed and on the documents' content, not on their
    order. Raises DataError for any text that cannot be used.
    """
    if heldout is not None:
        heldout_pool = Pool(seed, 0, section.heldout_tokens)
        _gather(heldout, tokenizer, section, heldout_pool, "held-out ")
        pool = Pool(seed, 0, section.train_tokens, heldout_pool.groups)
        _gather(texts, tokenizer, section, pool)
        held = divide(heldout_pool.candidates, 0, section.heldout_tokens).train
        train = divide(pool.candidates, 0, section.train_tokens).train
    else:
        pool = heldout_pool = Pool(seed, section.heldout_tokens, section.train_tokens)
        _gather(texts, tokenizer, section, pool)
        split = divide(pool.candidates, section.heldout_tokens, section.train_tokens)
        if pool.candidates:
            check_split(pool.candidates, split, section.heldout_tokens, section.train_tokens)
        held, train = split.heldout, split.train
    _refuse_empty(train, pool, section)
    _refuse_empty(held, heldout_pool, section)
    return (
        _write(section, tokenizer, pool, train, seed, out and out / "train"),
        _write(section, tokenizer, heldout_pool, held, seed, out and out / "heldout"),
    )


def _gather(
    texts: Texts, tokenizer: Any, section: WindowsRecipe, pool: Pool, kind: str = ""
) -> None:
    """Tokenize the documents that the pool admits."""
    size = texts.characters
    with progress.bar(f"Tokenizing {kind}text", size, "characters") as advance:
        for batch in _batches(texts.documents):
            admitted = []
            for document in batch:
                key = pool.admit(group_hash(document), content_hash(document))
                if key is not None:
                    admitted.append((document, key))
            encoded = tokenize(
                [document for document, _ in admitted], tokenizer, section.control_tokens
            )
            pool.formats.update(document.about.format for document in batch)
            pool.notes.update(note for document in batch for note in document.about.notes)
            pool.notes.update(note for rows in encoded for note in rows[0].notes)
            for (document, key), rows in zip(admitted, encoded, strict=True):
                fitting = [_fit(row, document, section, pool) for row in rows]
                pool.add(key, [row for row in fitting if row is not None])
            pool.prune()
            done = min(sum(_size(document) for document in batch), size)
            size -= done
            advance(done)
        advance(size)
    for note, count in pool.notes.most_common(_MOST_NOTES):
        progress.note(f"{count:,} {kind}rows: {note}")


def _batches(documents: Iterable[AnyDocument]) -> Iterator[list[AnyDocument]]:
    batch: list[AnyDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += _size(document)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(document: AnyDocument) -> int:
    """Its characters, approximately."""
    if isinstance(document, Document):
        return len(document.text)
    if isinstance(document, Completion):
        return len(document.prompt) + len(document.completion)
    return sum(len(str(message.get("content"))) for message in document.messages)


def _fit(
    row: TokenRow, document: AnyDocument, section: WindowsRecipe, pool: Pool
) -> TokenRow | None:
    """The row, made to fit the context by the recipe's `long_rows`; None if it is dropped."""
    length, context = len(row.ids), section.context
    if row.splittable or length <= context:
        return row
    if section.long_rows == "error":
        raise DataError(
            f"The row has {length:,} tokens, more than the context of {context:,}",
            where=document.where,
            fix=f"set data.context to at least {length}, or data.long_rows to truncate or drop",
        )
    if section.long_rows == "truncate" and row.supervised[1:context].any():
        pool.rows_truncated += 1
        return TokenRow(row.ids[:context], row.supervised[:context], False)
    pool.rows_dropped += 1
    return None


def _refuse_empty(taken: Sequence[Taken], pool: Pool, section: WindowsRecipe) -> None:
    if taken:
        return
    reasons = {
        f"{pool.overlap_removed:,} documents are also in heldout_sources": pool.overlap_removed,
        f"{pool.rows_dropped:,} rows are longer than the context of {section.context:,}": (
            pool.rows_dropped
        ),
    }
    why = "; ".join(reason for reason, count in reasons.items() if count)
    raise DataError(
        f"No text is left to use: {why or 'the sources are empty'}",
        where="data",
        fix="give other sources, or raise data.context",
    )


def _write(
    section: WindowsRecipe,
    tokenizer: Any,
    pool: Pool,
    taken: Sequence[Taken],
    seed: int,
    out: Path | None,
) -> Windows:
    """Packs the rows taken; the order of windows is shuffled, because packing sorts by length."""
    rows = [pool.row(part.index) for part in taken]
    lengths = [part.tokens for part in taken]
    splittable = [row.splittable for row in rows]
    plan_windows = plan_isolated if section.packing == "isolated" else plan_single
    plan = plan_windows(lengths, splittable, section.context)
    order = np.random.default_rng(seed).permutation(len(plan))
    pad = tokenizer.pad_token_id
    pad_id = end_of_text(tokenizer) if pad is None else int(pad)
    ids = [row.ids for row in rows]
    supervised = [row.supervised for row in rows]
    shuffled = [plan[index] for index in order]
    windows = write_windows(
        out,
        fill_windows(shuffled, ids, supervised, section.context, pad_id),
        rows=len(plan),
        context=section.context,
        tokens=sum(lengths),
        documents=len({pool.candidates[part.index].key.exact for part in taken}),
        duplicates_dropped=pool.duplicates_dropped,
        overlap_removed=pool.overlap_removed,
        rows_truncated=pool.rows_truncated,
        rows_dropped=pool.rows_dropped,
        formats=dict(pool.formats.most_common()),
        notes=dict(pool.notes.most_common()),
        packing=section.packing,
        pad_token_id=pad_id,
    )
    if not windows.supervised_tokens:
        raise DataError(
            f"None of the {windows.info.tokens:,} tokens is supervised",
            where=out,
            fix="raise data.train_tokens and data.heldout_tokens, or give longer text",
        )
    return windows
