"""Builds windows of tokens from sources: read, tokenize, split, pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse import progress
from stillhouse.data.data_config import DataRecipe, Source
from stillhouse.data.documents import AnyDocument, Completion, Document, content_hash, group_hash
from stillhouse.data.packing import fill_windows, plan_isolated, plan_single
from stillhouse.data.row_pool import Pool
from stillhouse.data.sources import read_sources, size_estimate
from stillhouse.data.split import Taken, check_split, divide
from stillhouse.data.tokenize_rows import TokenRow, end_of_text, tokenize
from stillhouse.data.windows import WindowsInfo, write_windows
from stillhouse.errors import DataError

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1_000_000
"""Documents are tokenized together up to either limit: tokenizers use all cores on a batch."""


@dataclass(frozen=True)
class DataSummary:
    """What the data stage made."""

    train: WindowsInfo
    heldout: WindowsInfo


def build(section: DataRecipe, tokenizer: Any, *, seed: int, base: Path, out: Path) -> DataSummary:
    """Reads, tokenizes, divides and packs; writes out/train and out/heldout.

    `base`: the folder that relative paths start from. The result depends on the seed and on the
    documents' content, not on their order. Raises DataError for any text that cannot be used.
    """
    held_groups: set[bytes] = set()
    if section.heldout_sources:
        heldout_pool = Pool(seed, 0, section.heldout_tokens)
        _gather(section, section.heldout_sources, tokenizer, base, heldout_pool, "held-out ")
        held_groups = heldout_pool.groups
        heldout = divide(heldout_pool.candidates, 0, section.heldout_tokens).train
        pool = Pool(seed, 0, section.train_tokens, held_groups)
        _gather(section, section.sources, tokenizer, base, pool)
        train = divide(pool.candidates, 0, section.train_tokens).train
    else:
        pool = heldout_pool = Pool(seed, section.heldout_tokens, section.train_tokens)
        _gather(section, section.sources, tokenizer, base, pool)
        split = divide(pool.candidates, section.heldout_tokens, section.train_tokens)
        if pool.candidates:
            check_split(pool.candidates, split, section.heldout_tokens, section.train_tokens)
        heldout, train = split.heldout, split.train
    _refuse_empty(train, pool, section)
    _refuse_empty(heldout, heldout_pool, section)
    return DataSummary(
        train=_write(section, tokenizer, pool, train, seed, out / "train"),
        heldout=_write(section, tokenizer, heldout_pool, heldout, seed, out / "heldout"),
    )


def _gather(
    section: DataRecipe,
    sources: Sequence[Source],
    tokenizer: Any,
    base: Path,
    pool: Pool,
    kind: str = "",
) -> None:
    """Tokenizes the documents of the sources that the pool admits."""
    size = size_estimate(sources, base)
    with progress.bar(f"Tokenizing {kind}text", size, "characters") as advance:
        for batch in _batches(read_sources(sources, base)):
            wanted = []
            for document in batch:
                key = pool.admit(group_hash(document), content_hash(document))
                if key is not None:
                    wanted.append((document, key))
            encoded = tokenize([document for document, _ in wanted], tokenizer)
            for (document, key), rows in zip(wanted, encoded, strict=True):
                fitting = [_fit(row, document, section, pool) for row in rows]
                pool.add(key, [row for row in fitting if row is not None])
            pool.prune()
            done = min(sum(_size(document) for document in batch), size)
            size -= done
            advance(done)
        advance(size)


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


def _fit(row: TokenRow, document: AnyDocument, section: DataRecipe, pool: Pool) -> TokenRow | None:
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


def _refuse_empty(taken: Sequence[Taken], pool: Pool, section: DataRecipe) -> None:
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
    section: DataRecipe, tokenizer: Any, pool: Pool, taken: Sequence[Taken], seed: int, out: Path
) -> WindowsInfo:
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
    info = write_windows(
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
        packing=section.packing,
        pad_token_id=pad_id,
        tokenizer=str(getattr(tokenizer, "name_or_path", "")),
    )
    if not info.supervised_tokens:
        raise DataError(
            f"None of the {info.tokens:,} tokens is supervised: there is nothing to train on",
            where=out,
            fix="raise data.train_tokens and data.heldout_tokens, or give longer text",
        )
    return info
