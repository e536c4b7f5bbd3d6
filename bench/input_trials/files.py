"""Write rows to files in every format."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Values = Sequence[dict[str, Any]]
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def jsonl(rows: Values, *, ascii: bool = False) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows)


def table(rows: Values, delimiter: str = ",") -> str:
    """Format rows as CSV according to RFC 4180."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet(rows: Values) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()


def compress(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".bz2":
        return bz2.compress(data)
    if ending == ".xz":
        return lzma.compress(data)
    if ending == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    return data


def content(rows: Values, kind: str, chance: random.Random | None = None) -> bytes:
    """Return the content of a valid file: jsonl, json, json object, csv, tsv, or parquet."""
    if kind == "parquet":
        return parquet(rows)
    if kind == "json":
        return json.dumps(list(rows), ensure_ascii=False, indent=1 if chance else None).encode()
    if kind == "json object":
        return json.dumps({"data": list(rows)}, ensure_ascii=False).encode()
    if kind in ("csv", "tsv"):
        return table(rows, "," if kind == "csv" else "\t").encode()
    return jsonl(rows, ascii=bool(chance and chance.random() < 0.3)).encode()


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path
