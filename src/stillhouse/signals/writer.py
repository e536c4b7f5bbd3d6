"""Writing of a store's shards, which are complete under their final names, and its manifest."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.atomic_files import PARTIAL
from stillhouse.errors import StoreError
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import DenseRows, EntryRows, Rows, concatenate
from stillhouse.signals.manifest import (
    MANIFEST,
    SETTINGS,
    SHARDS,
    Manifest,
    Quality,
    Settings,
    ShardEntry,
    check_same,
    read_settings,
    write_checked_json,
    write_durably,
)
from stillhouse.signals.segments import Segments
from stillhouse.signals.shards import Shard, ShardHeader, open_shard, shard_bytes

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 600.0


class StoreWriter:
    """Adds segments to a new or an unfinished store.

    Rows are buffered until they fill `most_bytes` or are `most_seconds` old, and then become a
    shard, so a killed process loses at most one shard. Any number of processes can write to one
    store, each with its own writer. Once all are closed, `finish_store` writes the manifest.

    Raises SignalError if the store was begun with different settings. StoreError if it is damaged
    or cannot be written, or if the disk is full.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        *,
        most_bytes: int = SHARD_BYTES,
        most_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.path, self.settings = path, settings
        self.most_bytes, self.most_seconds = most_bytes, most_seconds
        self._fingerprint = settings.fingerprint()
        _begin(path, settings)
        self._known = {key for shard in open_shards(path, settings) for key in shard.keys_S}
        self._forget_pending()

    def _forget_pending(self) -> None:
        self._keys: list[bytes] = []
        self._rows_S: list[NDArray[np.int64]] = []
        self._rows: list[Rows] = []
        self._statistics = Statistics()
        self._bytes, self._since = 0, time.monotonic()

    def missing(self, segments: Segments) -> NDArray[np.bool_]:
        """Which segments the store lacks, [S]. Only the first of equal segments counts as
        missing."""
        seen: set[bytes] = set()
        is_new = []
        for key in segments.keys:
            is_new.append(key not in self._known and key not in seen)
            seen.add(key)
        return np.array(is_new, dtype=np.bool_)

    def add(self, segments: Segments, rows: Rows, statistics: Statistics) -> None:
        """Add the encoded rows of segments that are all `missing`, in their order."""
        assert len(rows) == segments.rows
        assert bool(self.missing(segments).all())
        if not len(segments):
            return
        self._keys.extend(segments.keys)
        self._known.update(segments.keys)
        self._rows_S.append(segments.rows_S)
        self._rows.append(rows)
        self._statistics += statistics
        self._bytes += _size(rows)
        if self._bytes >= self.most_bytes or time.monotonic() - self._since >= self.most_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last shard as a new shard."""
        if self._keys:
            pieces = shard_bytes(
                self._fingerprint,
                self.settings.vocabulary,
                self._keys,
                np.concatenate(self._rows_S),
                concatenate(self._rows),
                self._statistics,
            )
            write_durably(self.path / SHARDS / f"{uuid.uuid4().hex}.bin", pieces)
        self._forget_pending()

    def finish(self) -> Manifest:
        """Flush and write the manifest. Only the last writing process can call this."""
        self.flush()
        return finish_store(self.path)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Added rows are valid even if later work failed, but a full disk stays full.
        if not isinstance(error, StoreError):
            self.flush()


def uniforms(segments: Segments, settings: Settings) -> Tensor:
    """Random numbers in [0, 1), float64 [N, U], that depend only on the seed and each segment's
    key."""
    draws = settings.encoding.draws_per_row
    if not draws or not len(segments):
        return torch.empty(segments.rows, draws, dtype=torch.float64)
    generator, seed = torch.Generator(), settings.seed.to_bytes(8, "little", signed=True)
    parts = []
    for key, rows in zip(segments.keys, segments.rows_S.tolist(), strict=True):
        digest = hashlib.blake2b(key, digest_size=8, key=seed).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        parts.append(torch.rand(rows, draws, generator=generator, dtype=torch.float64))
    return torch.cat(parts)


def finish_store(path: Path) -> Manifest:
    """Check every shard, remove partial files of killed writers, and write the manifest.

    Call it once no process is writing. Raises StoreError if a shard is damaged.
    """
    settings = read_settings(path)
    for left in (path / SHARDS).glob(f".*{PARTIAL}"):
        left.unlink(missing_ok=True)
    manifest = describe(settings, map(Shard.summary, open_shards(path, settings)))
    write_checked_json(path / MANIFEST, manifest.to_json())
    return manifest


def describe(settings: Settings, summaries: Iterable[tuple[ShardHeader, ShardEntry]]) -> Manifest:
    """The manifest of a store with these shards."""
    found = list(summaries)
    total = sum((header.statistics for header, _ in found), Statistics())
    rows = sum(header.rows for header, _ in found)
    size = sum(entry.bytes for _, entry in found)
    of_rows = max(rows, 1)
    return Manifest(
        settings=settings,
        quality=Quality(
            captured_mass=total.mass / of_rows,
            variance=total.variance / of_rows,
            squared_bias=total.squared_bias / of_rows,
            entries=sum(header.entries for header, _ in found) / of_rows,
            bytes=size / of_rows,
        ),
        segments=sum(header.segments for header, _ in found),
        rows=rows,
        bytes=size,
        shards=tuple(entry for _, entry in found),
    )


def _begin(path: Path, settings: Settings) -> None:
    try:
        (path / SHARDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the store's folder cannot be created ({error.strerror})", where=path
        ) from error
    if not (path / SETTINGS).exists():
        if (path / MANIFEST).exists():
            raise StoreError("the store has a manifest but no settings.json", where=path)
        # Two processes that do this at once write the same settings, or one raises an error below.
        write_checked_json(path / SETTINGS, settings.to_json())
    check_same(read_settings(path), settings, path)


def open_shards(path: Path, settings: Settings) -> Iterator[Shard]:
    """Open and check the shards of a store one after another, in the order of their names."""
    for file in sorted((path / SHARDS).glob("*.bin")):
        yield open_shard(file, settings)


def _size(rows: Rows) -> int:
    if isinstance(rows, DenseRows):
        return rows.bits_NW.nbytes
    assert isinstance(rows, EntryRows)
    return 2 * len(rows) + rows.low_E.nbytes + rows.values_X.nbytes
