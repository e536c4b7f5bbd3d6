"""The cost of comparing files with their hashes: `python -m bench.checks`.

Every function that hashes is timed, and its processor time is divided by that of the whole process.
Other programs on the machine hardly affect this ratio, since both are measured in the same run. The
recipes demo.yaml and stored.yaml run with less text and calibration but the same number of
checkpoints. The amount of hashed data stays the same, so the shares are upper bounds. Each recipe
runs twice: the second run finds every stage finished and compares every file.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest import mock

import torch
import xxhash

import stillhouse
from bench.common import Bar, write_results
from bench.store import make_windows, measure_writing, read_epoch
from stillhouse import checksums, runfolder
from stillhouse.checksums import write_sums
from stillhouse.language_model.signals_stage import SHARD_FILES, STORE
from stillhouse.signals import shards
from stillhouse.verify_folder import verify_folder

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = {
    "demo": (
        "data.train_tokens=4096",
        "data.heldout_tokens=1024",
        "student.calibration_tokens=1024",
        "train.checkpoint_every=4",
        "quantize.qat.tokens=1024",
        "evaluate.max_new_tokens=16",
    ),
    "stored": (
        "data.train_tokens=8192",
        "data.heldout_tokens=2048",
        "student.calibration_tokens=1024",
        "train.checkpoint_every=3",
        "evaluate.max_new_tokens=16",
        "export.dtype=float32",
    ),
}
"""Settings that shorten each recipe. So little training does not survive rounding to bfloat16: the
export would fail."""


@dataclass
class Time:
    """Processor and wall-clock time, and the hashed bytes."""

    cpu: float = 0.0
    wall: float = 0.0
    bytes: int = 0


@contextmanager
def hashing() -> Iterator[Time]:
    """Accumulate the time spent on hashing inside the block."""
    total = Time()

    def timed(function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                total.cpu += time.thread_time() - cpu
                total.wall += time.perf_counter() - wall
                total.bytes += size(*args)

        return call

    def of_bytes(content: Any, *_: Any) -> int:
        return memoryview(content).nbytes

    class Zlib:
        crc32 = staticmethod(timed(zlib.crc32, of_bytes))

    class Xxhash:
        xxh3_128_hexdigest = staticmethod(timed(xxhash.xxh3_128_hexdigest, of_bytes))

    def of_file(path: Path, *_: Any) -> int:
        return path.stat().st_size

    with ExitStack() as stack:
        for module, name, size in (
            (checksums, "_read", of_file),
            (checksums, "_hash_of", lambda _: 0),
            (runfolder, "sha", of_file),
        ):
            patched = timed(getattr(module, name), size)
            stack.enter_context(mock.patch.object(module, name, patched))
        stack.enter_context(mock.patch.object(shards, "zlib", Zlib))
        stack.enter_context(mock.patch.object(shards, "xxhash", Xxhash))
        yield total


@contextmanager
def whole() -> Iterator[Time]:
    total = Time()
    cpu, wall = time.process_time(), time.perf_counter()
    yield total
    total.cpu, total.wall = time.process_time() - cpu, time.perf_counter() - wall


def measure_recipe(name: str, folder: Path) -> dict[str, Any]:
    """Measure a recipe's first run and its second run, which finds every stage finished."""
    found: dict[str, Any] = {}
    for run in ("first", "second"):
        checksums._intact.clear()  # as in a new process
        with hashing() as hashed, whole() as took:
            overrides = [f"folder={folder / name}", *SHORT[name]]
            stillhouse.run(RECIPES / f"{name}.yaml", overrides=overrides)
        found[run] = {"hashing": asdict(hashed), "whole": asdict(took)}
        found[run]["share"] = hashed.cpu / took.cpu
    found["bytes_in_the_run_folder"] = sum(
        path.stat().st_size for path in (folder / name / "stages").rglob("*") if path.is_file()
    )
    return found


def measure_store(folder: Path, rounds: int) -> dict[str, Any]:
    """Read a recorded store for one epoch, including the comparisons when a run finds the stage
    finished and when the shards are opened."""
    windows, writing = make_windows(1024, 1024), {}

    def work(out: Path) -> runfolder.Outcome:
        writing.update(measure_writing(out / STORE, windows))
        return runfolder.Outcome()

    stages = runfolder.RunFolder(folder / "recorded")
    plan = runfolder.StagePlan("signals", {}, work, compared_when_read=(SHARD_FILES,))
    path = stages.stage(plan).path
    shares: dict[str, list[float]] = {"stage": [], "shards": []}
    for seed in range(rounds + 1):  # the first one warms up
        checksums._intact.clear()  # as in a new process
        with hashing() as compared:
            assert stages.finished(plan) is not None
        with hashing() as sums, whole() as reading:
            read_epoch(path / STORE, windows, seed, 1)
        shares["stage"].append(compared.cpu / reading.cpu)
        shares["shards"].append(sums.cpu / reading.cpu)
    found = {f"shares_{name}": values[1:] for name, values in shares.items()}
    return {"bytes_a_token": writing["bytes_a_token"], **found}


def measure_verify(folder: Path, rounds: int, size: int = 1 << 30) -> dict[str, list[float]]:
    """Bytes that `verify` reads per second of processor time from the page cache: the files of a
    stage (XXH3) and of an export (SHA-256)."""
    export, stages = folder / "export", runfolder.RunFolder(folder / "run")
    export.mkdir()
    block = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8).numpy().tobytes()
    with (export / "model.safetensors").open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
    write_sums(export)

    def work(out: Path) -> runfolder.Outcome:
        shutil.copy(export / "model.safetensors", out)
        return runfolder.Outcome()

    stage = stages.stage(runfolder.StagePlan("train", {}, work))
    found: dict[str, list[float]] = {"export": [], "stage": []}
    for name, path in {"export": export, "stage": stage.path}.items():
        for _ in range(rounds + 1):
            began = time.process_time()
            assert not any(part.problems for part in verify_folder(path))
            found[name].append(size / (time.process_time() - began))
    return {f"bytes_a_second_{name}": values[1:] for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--no-recipes", action="store_true", help="neither demo.yaml nor stored.yaml"
    )
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    bars: list[Bar] = []

    def judge(name: str, value: float, op: Literal["<=", ">="], bar: float) -> None:
        """Record a bar and print it immediately, since the recipes take minutes."""
        bars.append(Bar(name, value, op, bar))
        print(f"{'met ' if bars[-1].met else 'MISS'} {name}: {value:.4g} {op} {bar}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures["verify"] = verify = measure_verify(folder, options.rounds)
        for kind in ("stage", "export"):
            rate = max(verify[f"bytes_a_second_{kind}"])
            judge(f"verify, a {kind}: bytes a second", rate, ">=", 1e9)
        figures["store"] = store = measure_store(folder, options.rounds)
        share = median(store["shares_stage"]) + median(store["shares_shards"])
        judge("store: hashing, share of an epoch's reading", share, "<=", 0.03)
        for recipe in () if options.no_recipes else SHORT:
            figures[recipe] = measured = measure_recipe(recipe, folder)
            what = f"{recipe}, shortened: share of processor time that is hashing"
            judge(what, measured["first"]["share"], "<=", 0.02)
    if options.no_recipes:
        print(figures)
        return
    write_results("checks", figures, bars)


if __name__ == "__main__":
    main()
