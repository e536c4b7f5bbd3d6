"""Export of a store to one Parquet file, with one row per supervised token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.atomic_files import complete_or_absent
from stillhouse.disk_errors import disk_error
from stillhouse.errors import StoreError
from stillhouse.signals.decode import StoredSignal
from stillhouse.signals.manifest import SHARDS
from stillhouse.signals.segments import Segments
from stillhouse.signals.shards import open_shard
from stillhouse.signals.signal_types import (
    ChunkSignal,
    FrozenHeadSignal,
    SampledSignal,
    SparseSignal,
)
from stillhouse.signals.store import Store, open_store

ROWS_AT_A_TIME = 16384


def export_parquet(path: Path, out: Path) -> int:
    """Write a finished store to the file `out`, and return the number of rows.

    The columns are `key` (the segment's, in hex), `position` (0 for the segment's first supervised
    token), and `ids` with `probabilities` and, if it is stored, `tail`. The probabilities of
    sampled encodings sum to 1. Chunks have `in_chunk` and `chunk_log_probability` (NaN except where
    a chunk begins). Dense encodings have `vector` and `negative_entropy`, or `layer_N`. The
    manifest is in the file's metadata under `stillhouse`.
    Raises StoreError if the store is damaged or `out` cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = open_store(path)
    metadata = {"stillhouse": json.dumps(store.manifest.to_json(), ensure_ascii=False)}
    rows, writer = 0, None
    try:
        with complete_or_absent(out) as file, ExitStack() as opened:
            for segments in _in_parts(store):
                signal = _signal_columns(store.read(segments), segments.rows)
                table = pa.table(_segment_columns(segments) | signal)
                if writer is None:
                    schema = table.schema.with_metadata(metadata)
                    writer = opened.enter_context(pq.ParquetWriter(file, schema))
                writer.write_table(table.replace_schema_metadata(metadata))
                rows += segments.rows
    except OSError as error:
        problem = disk_error(error, out, fix="free some space and run the same command again")
        raise StoreError(
            "the Parquet file cannot be written: " + (problem.what if problem else str(error)),
            where=out,
            fix=None if problem is None else problem.fix,
        ) from error
    return rows


def _in_parts(store: Store) -> Iterator[Segments]:
    """All segments of a store, about ROWS_AT_A_TIME rows at a time."""
    for listed in store.manifest.shards:
        shard = open_shard(store.path / SHARDS / listed.name, store.settings)
        part_S = (np.cumsum(shard.rows_S) - shard.rows_S) // ROWS_AT_A_TIME
        everything = Segments(shard.keys_S, shard.rows_S)
        for part in np.unique(part_S):
            yield everything.only(part_S == part)


def _segment_columns(segments: Segments) -> dict[str, Any]:
    first_S = np.cumsum(segments.rows_S) - segments.rows_S
    position_N = np.arange(segments.rows) - np.repeat(first_S, segments.rows_S)
    keys = np.array([key.hex() for key in segments.keys])
    return {
        "key": keys[segments.segment_of_rows()],
        "position": position_N.astype(np.int32),
    }


def _signal_columns(signal: StoredSignal, rows: int) -> dict[str, Any]:
    if isinstance(signal, SparseSignal):
        p_NK = signal.log_probs_NK.exp()
        return {**_lists(signal.ids_NK, p_NK), "tail": signal.tail_N.numpy()}
    if isinstance(signal, SampledSignal):
        return _lists(signal.ids_NK, signal.counts_NK / signal.counts_NK.sum(1, keepdim=True))
    if isinstance(signal, ChunkSignal):
        return _chunk_columns(signal, rows)
    if isinstance(signal, FrozenHeadSignal):
        vector = _vectors(signal.vector_ND)
        return {"vector": vector, "negative_entropy": signal.negative_entropy_N.numpy()}
    return {f"layer_{layer}": _vectors(rows_ND) for layer, rows_ND in signal.hidden_ND.items()}


def _chunk_columns(signal: ChunkSignal, rows: int) -> dict[str, Any]:
    in_chunk, log_probability = np.zeros(rows, bool), np.full(rows, np.nan, np.float32)
    in_chunk[signal.rows_P] = True
    first = np.unique(signal.chunk_P, return_index=True)[1]
    log_probability[signal.rows_P[first]] = signal.log_probs_C
    return {"in_chunk": in_chunk, "chunk_log_probability": log_probability}


def _lists(ids_NK: Tensor, p_NK: Tensor) -> dict[str, Any]:
    """Ragged lists of the entries with nonzero weight."""
    import pyarrow as pa

    kept_NK = p_NK > 0
    offsets = np.concatenate([[0], kept_NK.sum(1).cumsum(0).numpy()]).astype(np.int32)
    ids_E, p_E = ids_NK[kept_NK].to(torch.int32).numpy(), p_NK[kept_NK].numpy()
    return {
        "ids": pa.ListArray.from_arrays(offsets, ids_E),
        "probabilities": pa.ListArray.from_arrays(offsets, p_E),
    }


def _vectors(rows_ND: Tensor) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(rows_ND.float().numpy().ravel(), rows_ND.shape[1])
