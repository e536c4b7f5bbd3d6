"""Shards: memory-mapped files of encoded rows. docs/signal-store.md specifies the format.

A shard is a header of 128 bytes, followed by planes: arrays that each start at a multiple of 8
bytes. Everything is little-endian.

Shapes: S segments, N rows, E entries, X values, W numbers in a dense row.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from stillhouse.errors import StoreError
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import GUARD, DenseRows, EntryRows, Rows
from stillhouse.signals.manifest import Settings, ShardEntry
from stillhouse.signals.segments import KEY_BYTES

MAGIC = b"STILLSIG"
VERSION = 1
HEADER_BYTES = 128
_HEADER = struct.Struct("<8sII16sQQQQ4B3I3d")
_CHECKS = struct.Struct("<II")
VALUES = {"u1": 1, "u2": 2, "f2": 3}
"""The header's codes for value types: unsigned 8-bit, unsigned 16-bit, float16."""
_DAMAGED = "delete this file and record its segments again, or restore it from a copy"


@dataclass(frozen=True)
class ShardHeader:
    """The contents of a shard's first 128 bytes.

    store: the fingerprint of the store's settings. width: 0 for entries. value_kind: 0 for dense
    rows.
    """

    store: bytes
    segments: int
    rows: int
    entries: int
    stored_values: int
    id_bytes: int
    value_kind: int
    has_valued: int
    has_scalar: int
    width: int
    vocabulary: int
    most: int
    statistics: Statistics

    def pack(self, payload_crc: int) -> bytes:
        numbers = [getattr(self, field.name) for field in fields(self)[:-1]]
        packed = _HEADER.pack(MAGIC, VERSION, HEADER_BYTES, *numbers, *astuple(self.statistics))
        packed = packed.ljust(HEADER_BYTES - _CHECKS.size, b"\0")
        return packed + _CHECKS.pack(payload_crc, zlib.crc32(packed))

    def planes(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield each plane's name, type, elements, and bytes with padding, in file order."""
        for name, kind, elements in self._planes():
            yield name, kind, elements, -(-elements * np.dtype(kind).itemsize // 8) * 8

    def _planes(self) -> Iterator[tuple[str, str, int]]:
        yield "keys", "u1", KEY_BYTES * self.segments
        yield "segment_rows", "<u4", self.segments
        if self.width:
            yield "bits", "<u2", self.rows * self.width
        else:
            yield "segment_entries", "<u4", self.segments
            yield "segment_values", "<u4", self.segments
            yield "counts", "u1", self.rows
            if self.has_valued:
                yield "valued", "u1", self.rows
            yield "low", "<u2", self.entries + GUARD
            if self.id_bytes == 3:
                yield "high", "u1", self.entries + GUARD
            kind = next(name for name, code in VALUES.items() if code == self.value_kind)
            yield "values", f"<{kind}", self.stored_values + GUARD
        if self.has_scalar:
            yield "scalar", "<f4", self.rows


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard: its header, and its rows as views of the file.

    keys_S: KEY_BYTES bytes each. rows_S, entries_S, values_S: number of elements of a plane that
    belong to each segment. The planes of ragged rows keep their GUARD elements. content: the whole
    file.
    """

    path: Path
    header: ShardHeader
    crc32: int
    keys_S: tuple[bytes, ...]
    rows_S: NDArray[np.int64]
    entries_S: NDArray[np.int64]
    values_S: NDArray[np.int64]
    rows: Rows
    content: memoryview

    @cached_property
    def firsts(self) -> list[NDArray[np.int64]]:
        """The first row, entry, and value of each segment, [S] each."""
        return [np.cumsum(n_S) - n_S for n_S in (self.rows_S, self.entries_S, self.values_S)]

    def summary(self) -> tuple[ShardHeader, ShardEntry]:
        """The header, and the manifest's entry for this shard."""
        numbers = (self.crc32, len(self.content), self.header.segments, self.header.rows)
        xxh3 = xxhash.xxh3_128_hexdigest(self.content)
        return self.header, ShardEntry(self.path.name, *numbers, xxh3)


def shard_bytes(
    store: bytes,
    vocabulary: int,
    keys: list[bytes],
    rows_S: NDArray[np.int64],
    rows: Rows,
    statistics: Statistics,
) -> list[bytes]:
    """Encode a shard as its header and planes, to be written one after another."""
    planes, header = _planes(rows_S, rows)
    planes |= {"keys": np.frombuffer(b"".join(keys), np.uint8), "segment_rows": rows_S}
    head = ShardHeader(
        store=store,
        segments=len(keys),
        rows=len(rows),
        vocabulary=vocabulary,
        statistics=statistics,
        **header,
    )
    pieces, crc = [], 0
    for name, kind, _, size in head.planes():
        plane = np.ascontiguousarray(planes[name], dtype=kind).tobytes()
        pieces.append(plane.ljust(size, b"\0"))
        crc = zlib.crc32(pieces[-1], crc)
    return [head.pack(crc), *pieces]


def _planes(rows_S: NDArray[np.int64], rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
    """The planes and header fields of encoded rows."""
    if isinstance(rows, DenseRows):
        numbers = ("entries", "stored_values", "id_bytes", "value_kind", "has_valued", "most")
        header = dict.fromkeys(numbers, 0)
        header |= {"has_scalar": int(rows.scalar_N is not None), "width": rows.bits_NW.shape[1]}
        return {"bits": rows.bits_NW, "scalar": rows.scalar_N}, header
    starts_S = np.cumsum(rows_S) - rows_S
    planes = {
        "segment_entries": np.add.reduceat(rows.counts_N, starts_S, dtype=np.int64),
        "segment_values": np.add.reduceat(rows.valued_counts, starts_S, dtype=np.int64),
        "counts": rows.counts_N,
        "valued": rows.valued_N,
        "low": rows.low_E,
        "high": rows.high_E,
        "values": rows.values_X,
        "scalar": rows.tail_N,
    }
    header = {
        "entries": len(rows.low_E),
        "stored_values": len(rows.values_X),
        "id_bytes": 2 if rows.high_E is None else 3,
        "value_kind": VALUES[rows.values_X.dtype.str[1:]],
        "has_valued": int(rows.valued_N is not None),
        "has_scalar": int(rows.tail_N is not None),
        "width": 0,
        "most": int(rows.counts_N.max()),
    }
    return planes, header


def open_shard(path: Path, settings: Settings, xxh3: str | None = None) -> Shard:
    """Map a shard, and check its checksum, lengths, and counts.

    xxh3: the XXH3 in the manifest, to check instead of the CRC-32, which is slower.

    Raises StoreError, with the file's path, if it is missing, truncated, damaged, from a different
    version, or if it was written with different settings.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            mapped = _map(file.fileno()) if size else b""
    except OSError as error:
        raise _unreadable(path, error) from error
    header, crc32 = _read_header(mapped, path)
    expected = HEADER_BYTES + sum(padded for *_, padded in header.planes())
    if size != expected:
        raise StoreError(
            f"the shard has {size} bytes, but its header says {expected}", where=path, fix=_DAMAGED
        )
    content = memoryview(mapped)
    if xxh3 is not None:
        whole = xxhash.xxh3_128_hexdigest(content) == xxh3
    else:
        whole = zlib.crc32(content[HEADER_BYTES:]) == crc32
    if not whole:
        raise StoreError(
            "the shard is damaged: its checksum does not match", where=path, fix=_DAMAGED
        )
    planes = _map_planes(mapped, header)
    if header.width:
        bits_NW = planes["bits"].reshape(-1, header.width)
        rows: Rows = DenseRows(bits_NW, planes.get("scalar"))
    else:
        rows = EntryRows(
            counts_N=planes["counts"],
            valued_N=planes.get("valued"),
            low_E=planes["low"],
            high_E=planes.get("high"),
            values_X=planes["values"],
            tail_N=planes.get("scalar"),
        )
    nothing_S = np.zeros(header.segments)
    shard = Shard(
        path=path,
        header=header,
        crc32=crc32,
        keys_S=_cut_keys(planes["keys"].tobytes()),
        rows_S=planes["segment_rows"].astype(np.int64),
        entries_S=planes.get("segment_entries", nothing_S).astype(np.int64),
        values_S=planes.get("segment_values", nothing_S).astype(np.int64),
        rows=rows,
        content=content,
    )
    _check_counts(shard)
    if header.store != settings.fingerprint():
        raise StoreError(
            "the shard belongs to a different store",
            where=path,
            fix="move it elsewhere, since its rows were recorded with different settings",
        )
    return shard


def _map(descriptor: int) -> mmap.mmap:
    """Map the whole file. All pages are read next, so fault them in with one call."""
    if hasattr(mmap, "MAP_POPULATE"):  # Linux
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def allow_open_files(files: int) -> None:
    """Raise this process's limit of open files by `files`, as far as the system allows.

    A mapped file counts as open, and large stores have more shards than the usual limits (1,024
    files on Linux, 256 on macOS).
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + files if hard == resource.RLIM_INFINITY else min(soft + files, hard)
    with suppress(ValueError, OSError):  # macOS's actual limit is below the one that it reports
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Read the keys of a shard's segments, and check only its header.

    A damaged key matches no segment, and `open_shard` rejects the file once one of its rows is
    read.
    """
    try:
        with path.open("rb") as file:
            header, _ = _read_header(file.read(HEADER_BYTES), path)
            keys = file.read(KEY_BYTES * header.segments)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(keys) != KEY_BYTES * header.segments:
        raise StoreError("the shard is truncated", where=path, fix=_DAMAGED)
    return _cut_keys(keys)


def _cut_keys(keys: bytes) -> tuple[bytes, ...]:
    return tuple(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))


def _unreadable(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        fix = "allow more open files with `ulimit -n`"
    elif error.errno == errno.ENOENT:
        fix = "restore it from a copy, or record its segments again"
    else:
        fix = "check its permissions and the disk, then run the same command again"
    return StoreError(f"the shard cannot be read ({error.strerror})", where=path, fix=fix)


def _read_header(mapped: mmap.mmap | bytes, path: Path) -> tuple[ShardHeader, int]:
    head = bytes(mapped[:HEADER_BYTES])
    if len(head) < HEADER_BYTES or head[: len(MAGIC)] != MAGIC:
        raise StoreError("this is not a shard of a signal store", where=path, fix=_DAMAGED)
    described = head[: -_CHECKS.size]
    payload_crc, header_crc = _CHECKS.unpack(head[-_CHECKS.size :])
    if zlib.crc32(described) != header_crc:
        raise StoreError("the shard's header is damaged", where=path, fix=_DAMAGED)
    _, version, size, *values = _HEADER.unpack(described[: _HEADER.size])
    if (version, size) != (VERSION, HEADER_BYTES):
        raise StoreError(
            f"the shard has format {version}, but this Stillhouse reads format {VERSION}",
            where=path,
            fix="use the Stillhouse that wrote the store, or record it again",
        )
    described_by = [*values[:-3], Statistics(*values[-3:])]
    return ShardHeader(*described_by), payload_crc


def _check_counts(shard: Shard) -> None:
    """Check that the counts that readers rely on add up, regardless of what wrote the file."""
    head, rows = shard.header, shard.rows
    fits = int(shard.rows_S.sum()) == head.rows and bool((shard.rows_S > 0).all())
    if isinstance(rows, EntryRows) and fits and head.rows:
        first_S = shard.firsts[0]
        entries_S = np.add.reduceat(rows.counts_N, first_S, dtype=np.int64)
        values_S = np.add.reduceat(rows.valued_counts, first_S, dtype=np.int64)
        fits = (
            np.array_equal(entries_S, shard.entries_S)
            and np.array_equal(values_S, shard.values_S)
            and int(entries_S.sum()) == head.entries
            and int(values_S.sum()) == head.stored_values
            and bool((rows.valued_counts <= rows.counts_N).all())
        )
    if not fits:
        raise StoreError("the shard's counts do not add up", where=shard.path, fix=_DAMAGED)


def _map_planes(mapped: mmap.mmap | bytes, header: ShardHeader) -> dict[str, NDArray[Any]]:
    planes, at = {}, HEADER_BYTES
    for name, kind, elements, size in header.planes():
        planes[name] = np.frombuffer(mapped, kind, elements, at)
        at += size
    return planes
