"""Builds windows of tokens from sources: read, tokenize, split, pack."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stillhouse import progress
from stillhouse.data.data_config import DataRecipe, Source, WindowsRecipe
from stillhouse.data.documents import AnyDocument, content_hash, group_hash, row_size
from stillhouse.data.packing import Segment, fill_windows, plan_isolated, plan_single
from stillhouse.data.row_pool import HashSet, Pool
from stillhouse.data.sources import read_sources, size_estimate
from stillhouse.data.split import Records, check_split, divide
from stillhouse.data.token_log import LoggedRow, TokenLog
from stillhouse.data.tokenize_rows import Ids, Mask, end_of_text, tokenize, too_long
from stillhouse.data.windows import Windows, write_windows
from stillhouse.errors import DataError
from stillhouse.stage_manifest import versions

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1_000_000
"""Limits of a batch of documents: fast tokenizers use all cores only for a batch."""

_MOST_NOTES = 12

TOKENIZED = "tokenized"
"""Folder of the tokens written so far; it is next to the folders of windows."""


@dataclass(frozen=True)
class Texts:
    """Documents to read once.

    characters: approximate total, for a progress bar. tokens: use about this many; None: all.
    """

    documents: Iterable[AnyDocument]
    characters: int = 0
    tokens: int | None = None


def texts_of(sources: Sequence[Source], base: Path) -> list[Texts]:
    """Texts of each source with a `tokens` limit, then the texts of all other sources together."""
    limited = [[source] for source in sources if source.tokens is not None]
    others = [source for source in sources if source.tokens is None]
    return [
        Texts(read_sources(some, base), size_estimate(some, base), some[0].tokens)
        for some in [*limited, *([others] if others else [])]
    ]


def build(
    section: DataRecipe,
    tokenizer: Any,
    *,
    seed: int,
    base: Path,
    out: Path,
    resume: str | None = None,
) -> tuple[Windows, Windows]:
    """Build training and held-out windows from a recipe's sources, in out/train and out/heldout.

    base: the folder that relative paths start from. resume: see `make_windows`, which also
    documents the errors.
    """
    heldout = texts_of(section.heldout_sources, base) if section.heldout_sources else None
    texts = texts_of(section.sources, base)
    return make_windows(texts, heldout, tokenizer, section, seed=seed, out=out, resume=resume)


def make_windows(
    texts: Sequence[Texts],
    heldout: Sequence[Texts] | None,
    tokenizer: Any,
    section: WindowsRecipe,
    *,
    seed: int = 0,
    out: Path | None = None,
    resume: str | None = None,
) -> tuple[Windows, Windows]:
    """Tokenize, split, and pack text into training and held-out windows.

    heldout: separate held-out text; None: split documents off `texts`. out: folder for both sets of
    windows; None: keep them in memory. resume: a string that identifies the tokenizer. Tokens are
    then kept in out/tokenized, so that a later call can continue; the caller deletes that folder.
    None: tokens go to a temporary file. The result depends on the seed and on the documents'
    content, not on their order. Raises DataError for any text that cannot be used.
    """
    windows = _Windows(tokenizer, section, seed, out)
    with ExitStack() as opened:

        def log(name: str) -> TokenLog:
            written_with = json.dumps([resume, section.control_tokens, versions()])
            file = opened.enter_context(_token_file(out, None if resume is None else name))
            return TokenLog(file, written_with)

        pool_log = heldout_log = log("train")
        if heldout is not None:
            heldout_log = log("heldout")
            heldout_pool = Pool(seed, 0, section.heldout_tokens, groups=HashSet())
            windows.gather(heldout, heldout_pool, heldout_log, "held-out ")
            assert heldout_pool.groups is not None
            pool = Pool(seed, 0, section.train_tokens, heldout_pool.groups)
            windows.gather(texts, pool, pool_log)
            held = divide(heldout_pool.candidates, 0, section.heldout_tokens).train
            train = divide(pool.candidates, 0, section.train_tokens).train
        else:
            pool = heldout_pool = Pool(seed, section.heldout_tokens, section.train_tokens)
            windows.gather(texts, pool, pool_log)
            split = divide(pool.candidates, section.heldout_tokens, section.train_tokens)
            if len(pool.candidates):
                check_split(pool.candidates, split, section.heldout_tokens, section.train_tokens)
            held, train = split.heldout, split.train
        _reject_empty(train, pool, section.context)
        _reject_empty(held, heldout_pool, section.context)
        return (
            windows.write(train, pool, pool_log, "train"),
            windows.write(held, heldout_pool, heldout_log, "heldout"),
        )


def _token_file(out: Path | None, name: str | None) -> BinaryIO:
    """Open the file of tokens. name: of a file to keep; None: delete it when it is closed."""
    if out is None:
        return BytesIO()
    out.mkdir(parents=True, exist_ok=True)
    if name is None:
        return tempfile.TemporaryFile(dir=out)
    (out / TOKENIZED).mkdir(exist_ok=True)
    path = out / TOKENIZED / name
    path.touch()
    return path.open("r+b")


def _batches(documents: Iterable[AnyDocument]) -> Iterator[list[AnyDocument]]:
    batch: list[AnyDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += row_size(document)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reject_empty(taken: Records, pool: Pool, context: int) -> None:
    if len(taken):
        return
    reasons, fixes = [], []
    if pool.overlap_removed:
        reasons.append(f"{pool.overlap_removed:,} documents are also in the held-out text")
        fixes.append("use held-out text that is different from the training text")
    if pool.rows_dropped:
        reasons.append(f"{pool.rows_dropped:,} rows are longer than the context of {context:,}")
        fixes.append("raise data.context")
    raise DataError(
        f"No text is left to use: {'; '.join(reasons) or 'the sources are empty'}",
        where="data",
        fix="; ".join(fixes) or "use different sources",
    )


@dataclass(frozen=True)
class _Windows:
    """Turns texts into windows, as a section of a recipe says. The arguments are those of
    `make_windows`."""

    tokenizer: Any
    section: WindowsRecipe
    seed: int
    out: Path | None

    def gather(self, texts: Sequence[Texts], pool: Pool, log: TokenLog, kind: str = "") -> None:
        """Add the rows of the texts to the pool, and their tokens to the log."""
        for some in texts:
            own = pool if some.tokens is None else pool.of_source(some.tokens)
            self._gather_one(some, own, log, kind)
            if own is not pool:
                pool.take(own)
        for note, count in pool.notes.most_common(_MOST_NOTES):
            progress.note(f"{count:,} {kind}rows: {note}")

    def _gather_one(self, texts: Texts, pool: Pool, log: TokenLog, kind: str) -> None:
        """Tokenize the documents that the pool admits, unless their tokens are in the log."""
        size = texts.characters
        with progress.bar(f"Tokenizing {kind}text", size, "characters") as advance:
            for batch in _batches(texts.documents):
                admitted = []
                hashes = hashlib.sha256()
                for document in batch:
                    exact = content_hash(document)
                    key = pool.admit(group_hash(document), exact)
                    if key is not None:
                        admitted.append((document, key))
                        hashes.update(exact)
                logged = log.find(hashes.hexdigest())
                if logged is None:
                    documents = [document for document, _ in admitted]
                    encoded = tokenize(documents, self.tokenizer, self.section.control_tokens)
                    logged = log.append(hashes.hexdigest(), encoded)
                pool.formats.update(document.about.format for document in batch)
                pool.notes.update(note for document in batch for note in document.about.notes)
                pool.notes.update(note for rows in logged for note in rows[0].notes)
                for (document, key), rows in zip(admitted, logged, strict=True):
                    fitting = [self._fit(row, document.where, pool, log) for row in rows]
                    pool.add(key, [row for row in fitting if row is not None])
                pool.prune()
                done = min(sum(map(row_size, batch)), size)
                size -= done
                advance(done)
            advance(size)

    def _fit(self, row: LoggedRow, where: str, pool: Pool, log: TokenLog) -> LoggedRow | None:
        """Fit the row into the context as `long_rows` says; None if it is dropped."""
        context, long_rows = self.section.context, self.section.long_rows
        if row.splittable or row.tokens <= context:
            return row
        if long_rows == "error":
            raise too_long(row.tokens, where, context)
        if long_rows == "truncate" and log.read(row.start, 1, context - 1)[1].any():
            pool.rows_truncated += 1
            return row._replace(tokens=context)
        pool.rows_dropped += 1
        return None

    def write(self, taken: Records, pool: Pool, log: TokenLog, name: str) -> Windows:
        """Pack the rows taken. The windows are shuffled, because packing sorts by length."""
        context, out = self.section.context, self.out and self.out / name
        rows = pool.candidates[taken["index"]]
        starts = rows["start"]
        lengths = np.ascontiguousarray(taken["tokens"]).data
        plan_windows = plan_isolated if self.section.packing == "isolated" else plan_single
        plan = plan_windows(lengths, rows["splittable"].tolist(), context)
        order = np.random.default_rng(self.seed).permutation(len(plan))
        pad = self.tokenizer.pad_token_id
        pad_id = end_of_text(self.tokenizer) if pad is None else int(pad)

        def read(segment: Segment) -> tuple[Ids, Mask]:
            return log.read(int(starts[segment.row]), segment.start, segment.length)

        windows = write_windows(
            out,
            fill_windows((plan[window] for window in order), read, context, pad_id),
            rows=len(plan),
            context=context,
            tokens=int(taken["tokens"].sum()),
            documents=int(np.count_nonzero(rows["key"][1:] != rows["key"][:-1])) + 1,
            duplicates_dropped=pool.duplicates_dropped,
            overlap_removed=pool.overlap_removed,
            rows_truncated=pool.rows_truncated,
            rows_dropped=pool.rows_dropped,
            formats=dict(pool.formats.most_common()),
            notes=dict(pool.notes.most_common()),
            packing=self.section.packing,
            pad_token_id=pad_id,
        )
        if not windows.supervised_tokens:
            raise DataError(
                f"None of the {windows.info.tokens:,} tokens is supervised",
                where=out,
                fix="raise data.train_tokens and data.heldout_tokens, or use longer text",
            )
        return windows
