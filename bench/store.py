"""The speed of writing and reading a signal store: `python -m bench.store`.

Rows of about 16 entries, as `threshold` makes them, are packed and written, and then read in random
batches of windows, as in training. The time includes keys, lookup, shard checksums at first use,
and decoding to tensors. For comparison, the same rows are read from Parquet lists through Python
objects, the usual way. If a teacher is given, selection is timed relative to its full forward pass
with the head.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from bench.common import Bar, write_results
from stillhouse.signals import DenseSignal, LMHead, SampledSignal
from stillhouse.signals.encode import Encoder, Statistics
from stillhouse.signals.encoded_rows import EntryRows
from stillhouse.signals.encodings import Threshold
from stillhouse.signals.lm_head import head_logits
from stillhouse.signals.manifest import Settings
from stillhouse.signals.parquet_export import export_parquet
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import Segments, find_segments
from stillhouse.signals.store import Store, open_store
from stillhouse.signals.tune_threshold import top_probabilities, tune_threshold
from stillhouse.signals.writer import StoreWriter

SEED = 0
VOCABULARY = 49152
ENTRIES = 16
BATCH = 16
PARQUET_ROWS = 200_000
SHARD_BYTES = 8 << 20
"""Small, so that a batch reads from several shards, as in a large store."""


def make_windows(windows: int, context: int) -> tuple[torch.Tensor, ...]:
    """Make random windows of three or four segments each: input_ids, labels, position_ids."""
    g = torch.Generator().manual_seed(SEED)
    ids_RL = torch.randint(0, VOCABULARY, (windows, context), generator=g)
    starts_RL = torch.rand(windows, context, generator=g) < 2.5 / context
    starts_RL[:, 0] = True
    place_L = torch.arange(context)
    positions_RL = place_L - torch.where(starts_RL, place_L, 0).cummax(1).values
    return ids_RL, ids_RL.masked_fill(starts_RL, -100), positions_RL


def make_rows(rows: int) -> EntryRows:
    """Make selected rows: 1 to 8 exact entries, and draws up to ENTRIES entries on average."""
    chance = np.random.default_rng(SEED)
    valued_N = chance.integers(1, 9, rows, dtype=np.uint8)
    counts_N = valued_N + chance.integers(1, 2 * (ENTRIES - 4) - 1, rows, dtype=np.uint8)
    entries, values = int(counts_N.sum(dtype=np.int64)), int(valued_N.sum(dtype=np.int64))
    low_E = chance.integers(0, VOCABULARY, entries, dtype=np.uint16)
    return EntryRows(
        counts_N, valued_N, low_E, None, chance.integers(1, 30, values, dtype=np.uint8), None
    )


def cut(rows: EntryRows, bounds: np.ndarray) -> list[EntryRows]:
    """Split the rows into parts, as several passes of a teacher would produce them."""
    assert rows.valued_N is not None
    entries = np.concatenate([[0], np.cumsum(rows.counts_N, dtype=np.int64)])[bounds]
    values = np.concatenate([[0], np.cumsum(rows.valued_N, dtype=np.int64)])[bounds]
    return [
        EntryRows(
            rows.counts_N[a:b],
            rows.valued_N[a:b],
            rows.low_E[entries[i] : entries[i + 1]],
            None,
            rows.values_X[values[i] : values[i + 1]],
            None,
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_writing(path: Path, windows: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    ids_RL, labels_RL, positions_RL = windows
    batches = [
        find_segments(*(tensor[at : at + BATCH] for tensor in (ids_RL, labels_RL, positions_RL)))
        for at in range(0, len(ids_RL), BATCH)
    ]
    bounds = np.cumsum([0, *(batch.rows for batch in batches)])
    parts = cut(make_rows(int(bounds[-1])), bounds)

    def write() -> None:
        settings = Settings(Threshold(0.03), VOCABULARY, {})
        with StoreWriter(path, settings, most_bytes=SHARD_BYTES) as writer:
            for segments, rows in zip(batches, parts, strict=True):
                writer.add(segments, rows, Statistics())
            writer.finish()

    took = seconds(write)
    manifest = open_store(path).manifest
    return {
        "rows": manifest.rows,
        "segments": manifest.segments,
        "entries_a_token": manifest.quality.entries,
        "bytes_a_token": manifest.quality.bytes,
        "seconds": took,
        "tokens_a_second": manifest.rows / took,
    }


def batches_of(windows: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Make batches of all windows, in random order."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed)).split(BATCH)


def read_epoch(
    path: Path, windows: tuple[torch.Tensor, ...], seed: int, workers: int
) -> tuple[int, float]:
    """Return the number of rows, and the seconds from opening the store to the last tensor."""
    started = time.perf_counter()
    store = open_store(path)

    def read(chosen: torch.Tensor) -> int:
        segments = find_segments(*(tensor[chosen] for tensor in windows))
        signal = store.read(segments)
        assert isinstance(signal, SampledSignal)
        return len(signal.counts_NK)

    with ThreadPoolExecutor(workers) as pool:
        rows = sum(pool.map(read, batches_of(len(windows[0]), seed)))
    return rows, time.perf_counter() - started


def decode_epoch(
    store: Store, windows: tuple[torch.Tensor, ...], seed: int, workers: int
) -> tuple[int, float]:
    """Like `read_epoch`, but for an open store, with the keys of all batches computed before."""
    batches: list[Segments] = [
        find_segments(*(tensor[chosen] for tensor in windows))
        for chosen in batches_of(len(windows[0]), seed)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for signal in pool.map(store.read, batches):
            assert isinstance(signal, SampledSignal)
    return sum(batch.rows for batch in batches), time.perf_counter() - started


def read_parquet_lists(path: Path, rows: int) -> float:
    """Tokens/s when reading Parquet lists through Python objects to padded tensors."""
    started = time.perf_counter()
    table = pq.read_table(path, columns=["ids", "probabilities"]).slice(0, rows)
    ids, weights = table["ids"].to_pylist(), table["probabilities"].to_pylist()
    for at in range(0, len(ids), 8192):
        for column in (ids, weights):
            parts = [torch.tensor(row) for row in column[at : at + 8192]]
            torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return len(ids) / (time.perf_counter() - started)


def measure_reading(path: Path, windows: tuple[torch.Tensor, ...], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "signals.parquet"
        export_parquet(path, out)
        store = open_store(path)
        found: dict[str, list[float]] = {}
        for seed in range(rounds + 1):  # the first one warms up
            for workers in (1, 2):
                rows, took = read_epoch(path, windows, seed, workers)
                found.setdefault(f"with_keys_and_opening_{workers}_threads", []).append(rows / took)
                rows, took = decode_epoch(store, windows, seed, workers)
                found.setdefault(f"decode_{workers}_threads", []).append(rows / took)
            found.setdefault("parquet_lists", []).append(read_parquet_lists(out, PARQUET_ROWS))
        return {f"tokens_a_second_{name}": values[1:] for name, values in found.items()}


def measure_selection(teacher: Path, text: Path, rounds: int) -> dict[str, Any]:
    """Seconds per token of the teacher's forward pass with its head, and of selection."""
    from stillhouse.teachers.backbone import hidden_states, lm_head
    from stillhouse.teachers.load_model import load_model, load_tokenizer

    model = load_model(teacher, dtype=torch.float32)
    words = load_tokenizer(teacher)(text.read_text(encoding="utf-8")[:20_000])["input_ids"]
    ids_RL = torch.tensor(words[:2048]).view(4, 512)
    segments = find_segments(ids_RL, ids_RL.clone())
    head: LMHead = lm_head(model)

    def forward() -> torch.Tensor:
        return torch.cat([hidden_states(model, row_L[None], None)[:, :-1] for row_L in ids_RL])

    hidden_ND = forward().flatten(0, 1)
    chunks = hidden_ND.split(256)
    sample_nK = torch.cat([top_probabilities(head_logits(head, part_nD)) for part_nD in chunks])
    vocabulary = head.weight_VD.shape[0]
    tuned = tune_threshold(sample_nK, vocabulary, entries=ENTRIES)
    recorder = Recorder(Settings(tuned.encoding, vocabulary, {}))
    encoder = Encoder(tuned.encoding, vocabulary)
    logits_nV = head_logits(head, chunks[0])
    uniforms_nU = torch.rand(len(logits_nV), 2, dtype=torch.float64)
    times: dict[str, list[float]] = {
        "backbone": [],
        "head": [],
        "head_and_record": [],
        "select": [],
    }
    for _ in range(rounds):
        rows = len(hidden_ND)
        times["backbone"].append(seconds(forward) / rows)
        times["head"].append(
            seconds(lambda: [head_logits(head, part_nD) for part_nD in chunks]) / rows
        )
        answer = DenseSignal(hidden_ND, head)
        times["head_and_record"].append(seconds(partial(recorder.encode, segments, answer)) / rows)
        times["select"].append(seconds(lambda: encoder(logits_nV, uniforms_nU)) / len(logits_nV))
    return {
        "tau": tuned.encoding.tau,
        "entries_a_token": tuned.entries_per_row,
        "bytes_a_token": tuned.bytes_per_row,
        **{f"seconds_a_token_{name}": values for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--teacher", type=Path, help="model folder, to time selection and its forward pass"
    )
    parser.add_argument("--text", type=Path, help="text for the teacher")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    windows = make_windows(options.windows, options.context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        writing = measure_writing(path, windows)
        reading = measure_reading(path, windows, options.rounds)
    cold = max(reading["tokens_a_second_with_keys_and_opening_2_threads"])
    warm = max(reading["tokens_a_second_decode_2_threads"])
    parquet = max(reading["tokens_a_second_parquet_lists"])
    bars = [
        Bar("reading: tokens/s, decoded to tensors", warm, ">=", 5e6),
        Bar("reading with keys, opening, and checksums: tokens/s", cold, ">=", 5e6),
        Bar("reading: times the rate of Parquet lists", warm / parquet, ">=", 20),
        Bar("packing and writing: tokens/s", writing["tokens_a_second"], ">=", 1e6),
        Bar("bytes/token at 16 entries, everything included", writing["bytes_a_token"], "<=", 40),
    ]
    figures = {"writing": writing, "reading": reading}
    if options.teacher:
        figures["selection"] = selection = measure_selection(
            options.teacher, options.text, options.rounds
        )
        bare = min(selection["seconds_a_token_backbone"]) + min(selection["seconds_a_token_head"])
        scored = min(selection["seconds_a_token_backbone"]) + min(
            selection["seconds_a_token_head_and_record"]
        )
        bars.append(Bar("scoring: times the bare forward pass", scored / bare, "<=", 1.1))
    write_results("store", figures, bars)


if __name__ == "__main__":
    main()
