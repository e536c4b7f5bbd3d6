"""A reader that follows only docs/signal-store.md agrees with the store's own reader."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stillhouse.signals import SparseSignal
from stillhouse.signals.encodings import EntryEncoding
from stillhouse.signals.store import open_store
from tests.signals import toys

Row = tuple[dict[int, float], float | None]  # {id: probability or weight}, tail
TYPES = {1: ("B", 1), 2: ("H", 2), 3: ("e", 2)}


def read_as_documented(folder: Path) -> dict[bytes, list[Row]]:
    """The rows of every segment, by its key, read as the documentation describes."""
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    checksum = manifest.pop("checksum")
    body = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    assert hashlib.blake2b(body.encode(), digest_size=16).hexdigest() == checksum
    found: dict[bytes, list[Row]] = {}
    for listed in manifest["shards"]:
        data = (folder / "shards" / listed["name"]).read_bytes()
        assert len(data) == listed["bytes"]
        assert data[:16] == b"STILLSIG" + struct.pack("<II", 1, 128)
        assert data[16:32].hex() == manifest["fingerprint"]
        assert struct.unpack_from("<II", data, 120) == (
            zlib.crc32(data[128:]),
            zlib.crc32(data[:120]),
        )
        found |= read_shard(data, manifest["encoding"]["kind"])
    return found


def read_shard(data: bytes, kind: str) -> dict[bytes, list[Row]]:
    segments, rows, entries, values = struct.unpack_from("<4Q", data, 32)
    id_bytes, value_type, has_valued, has_scalar = struct.unpack_from("<4B", data, 64)
    at = 128

    def plane(letter: str, size: int, count: int) -> tuple[Any, ...]:
        nonlocal at
        numbers = struct.unpack_from("<" + letter * count, data, at)
        at += -(-size * count // 8) * 8
        return numbers

    keys = plane("16s", 16, segments)
    segment_rows = plane("I", 4, segments)
    plane("I", 4, segments)
    plane("I", 4, segments)
    counts = plane("B", 1, rows)
    valued = plane("B", 1, rows) if has_valued else counts
    ids: Sequence[int] = plane("H", 2, entries + 256)
    if id_bytes == 3:
        ids = [
            low + (high << 16) for low, high in zip(ids, plane("B", 1, entries + 256), strict=True)
        ]
    value = plane(*TYPES[value_type], values + 256)
    tails = plane("f", 4, rows) if has_scalar else [None] * rows
    assert at == len(data)

    decoded, entry, first = [], 0, 0
    for count, exact, tail in zip(counts, valued, tails, strict=True):
        decoded.append(
            row(kind, ids[entry : entry + count], value[first : first + exact], value_type, tail)
        )
        entry, first = entry + count, first + exact
    bounds = [sum(segment_rows[:i]) for i in range(segments + 1)]
    return {key: decoded[bounds[i] : bounds[i + 1]] for i, key in enumerate(keys)}


def row(
    kind: str, ids: Sequence[int], values: Sequence[float], value_type: int, tail: float | None
) -> Row:
    if kind in ("top_k", "top_p"):
        weights = [math.exp(v) for v in values]
    elif kind == "sampled":
        weights = [v / sum(values) for v in values]
    else:
        units = {1: 255, 2: 65535}[value_type]
        drawn = len(ids) - len(values)
        rest = 1 - sum(values) / units
        weights = [v / units for v in values] + [rest / drawn] * drawn
    total: dict[int, float] = {}
    for token, weight in zip(ids, weights, strict=True):
        total[token] = total.get(token, 0.0) + weight
    return total, tail


@pytest.mark.parametrize("vocabulary", [300, 66_000])
@pytest.mark.parametrize("encoding", toys.ENTRY_ENCODINGS, ids=repr)
def test_the_documented_format_gives_the_same_rows(
    tmp_path: Path, encoding: EntryEncoding, vocabulary: int
) -> None:
    data = toys.batch(windows=2, vocabulary=vocabulary)
    toys.record(tmp_path, toys.settings(encoding, vocabulary), data, shards=2)
    by_key = read_as_documented(tmp_path)
    rows = [row for key in data.segments.keys for row in by_key[key]]
    signal = open_store(tmp_path).read(data.segments)
    p_NV = toys.estimate(signal, vocabulary)
    renormalize = encoding.kind == "top_k" and not encoding.tail
    for n, (weights, tail) in enumerate(rows):
        total = sum(weights.values()) if renormalize else 1.0
        assert set(p_NV[n].nonzero()[:, 0].tolist()) <= set(weights)
        for token, weight in weights.items():
            assert float(p_NV[n, token]) == pytest.approx(weight / total, rel=1e-3, abs=1e-7)
        if isinstance(signal, SparseSignal):
            assert float(signal.tail_N[n]) == pytest.approx(tail)
