"""Everything that can be measured only on a GPU, in at most 8 minutes: `make bench NAME=gpu`.

Parts: the tests that need a GPU; the fused loss with dense and sparse signals, compared with its
roofline and with Liger; training steps of models with random weights, with their throughput and
with their peak memory compared with the plan; and how much memory a second process can use after a
training.

Each part is a separate process with a time limit. The results file is written after every part; for
a part that failed or was cut short, it contains the figures so far and the reason. To try the
script, use `--device cpu` with small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import Bar, write_results
from bench.gpu_parts import PAIRS, add_sizes
from stillhouse.hardware import default_device

LEAST_SECONDS = 5.0
"""A part is not started if less time is left."""
RESERVE_SECONDS = 10.0
"""Time kept for startup and for writing the results."""
ROOFLINE, OF_LIGER, SPARSE, UTILIZATION, PLANNED, FREE = 0.6, 0.65, 0.8, 0.4, 0.1, 0.95


@dataclass(frozen=True)
class Part:
    """One part. arguments: for `bench.gpu_parts`. seconds: its time limit."""

    name: str
    arguments: Sequence[str]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for all parts")
    parser.add_argument(
        "--only", nargs="*", help="run only these parts, given by the first word of their names"
    )
    parser.add_argument("--name", default="gpu", help="name of the results file")
    add_sizes(parser)
    options = parser.parse_args()
    device = default_device().type
    if options.device != device:
        parser.error(f"this machine's device is {device}: use --device {device}, with small sizes")
    deadline = time.monotonic() + 60 * options.minutes - RESERVE_SECONDS
    figures: dict[str, Any] = {"settings": vars(options)}
    for part in parts(options):
        if options.only and part.name.split()[0] not in options.only:
            continue
        figures[part.name] = measured(part, min(part.seconds, deadline - time.monotonic()))
        print(part.name, json.dumps(figures[part.name])[:2000], flush=True)
        write_results(options.name, figures, bars(figures, options.device))


def parts(options: argparse.Namespace) -> list[Part]:
    """Return the parts, most important first, in case there is no time for all.

    Time limits are for 8 minutes, and are scaled for other values of --minutes.
    """
    scale = options.minutes / 8
    sizes: list[str] = []
    for name in ("device", "rows", "vocab", "width", "context", "steps", "rounds"):
        values = getattr(options, name)
        sizes += [f"--{name}", *map(str, values if isinstance(values, list) else [values])]
    steps = [
        Part(f"step {pair}", ["step", "--pairs", pair, *sizes], scale * 75)
        for pair in options.pairs
    ]
    return [
        Part("tests", ["tests", *sizes], scale * 130),
        Part("loss", ["loss", *sizes], scale * 100),
        *steps,
        Part("after", ["after", "--pairs", options.pairs[0], *sizes], scale * 80),
    ]


def measured(part: Part, seconds: float) -> dict[str, Any]:
    """Run a part; return its figures, and `failed` with the reason if it did not finish."""
    if seconds < LEAST_SECONDS:
        return {"failed": "no time was left"}
    command = [sys.executable, "-m", "bench.gpu_parts", *part.arguments]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            # A new session, so that its children can be killed with it at the limit.
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, start_new_session=True
            )
            failed = None
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                failed = f"cut short after {seconds:.0f} s"
            else:
                if status:
                    lines = err.read_text("utf-8", "replace").strip().splitlines()
                    failed = lines[-1][:300] if lines else f"exit status {status}"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = figures_of(out.read_text("utf-8", "replace"))
    found["seconds"] = time.monotonic() - began
    if failed is not None:
        found["failed"] = failed
    return found


def figures_of(output: str) -> dict[str, Any]:
    """Merge the JSON lines that a part printed; the last line can be incomplete."""
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found |= json.loads(line)
    return found


def bars(figures: dict[str, Any], device: str) -> list[Bar]:
    """Return the bars for the figures so far. Speed and memory are not judged on a CPU."""
    found = []
    tests = figures.get("tests", {})
    if "failures" in tests:
        found.append(Bar("failed tests", tests["failures"], "<=", 0))
        if device == "cuda":
            found.append(Bar("tests that ran", tests["passed"], ">=", 1))
    if device != "cuda":
        return found
    for key, loss in figures.get("loss", {}).items():
        if not isinstance(loss, dict):
            continue
        found.append(Bar(f"{key}: share of the roofline", loss["roofline"], ">=", ROOFLINE))
        if "liger" in loss:
            found.append(Bar(f"{key}: time / Liger", loss["liger"]["time"], "<=", OF_LIGER))
        if "sparse" in loss:
            found.append(Bar(f"{key}: sparse / dense", loss["sparse"], "<=", SPARSE))
    for pair in PAIRS:
        step = figures.get(f"step {pair}", {})
        if "utilization" in step:
            found.append(Bar(f"{pair}: MFU of the product rate", step["utilization"], ">=",
                             UTILIZATION))  # fmt: skip
            away = abs(step["planned"] / step["peak"] - 1)
            found.append(Bar(f"{pair}: planned / peak, away from 1", away, "<=", PLANNED))
    after = figures.get("after", {})
    if "free" in after:
        found.append(Bar("free for a second process", after["free"], ">=", FREE))
    return found


if __name__ == "__main__":
    main()
