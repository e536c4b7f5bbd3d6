"""Rates of float32 matrix products on a CPU: MKL (`torch.mm`) and oneDNN (`cpu_products`).

    python -m bench.float32_products

Measures the products of SmolLM2-135M's layers, forward and backward, for a micro-batch of 256
tokens, once with all instructions of this CPU and once with AVX2 alone, each in a separate process.
The two libraries take turns; the best round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.common import Bar, write_results
from stillhouse.cpu_products import product

ROWS = 256
LAYERS = ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 1024), (1024, 576))
"""(inputs, outputs)"""
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
INSTRUCTIONS: dict[str, dict[str, str]] = {"all": {}, "AVX2": AVX2}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rates(rounds: int) -> dict[str, dict[str, float]]:
    """Return the FLOP/s of each library for each product."""
    found: dict[str, dict[str, float]] = {}
    torch.manual_seed(0)
    for inputs, outputs in LAYERS:
        x_NK, w_MK = torch.randn(ROWS, inputs), torch.randn(outputs, inputs)
        g_NM = torch.randn(ROWS, outputs)
        for name, a, b in (
            ("forward", x_NK, w_MK),
            ("gradient of the input", g_NM, w_MK.T),
            ("gradient of the weight", g_NM.T, x_NK.T),
        ):
            works: dict[str, Callable[[], object]] = {
                "mkl": partial(torch.mm, a, b.T),
                "onednn": partial(product, a, b),
            }
            every = [{key: seconds(work) for key, work in works.items()} for _ in range(rounds)]
            times = {key: [each[key] for each in every[1:]] for key in works}
            operations = 2 * ROWS * inputs * outputs
            found[f"{inputs} to {outputs}, {name}"] = {
                key: operations / min(values) for key, values in times.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--here", action="store_true", help="measure in this process and print JSON"
    )
    options = parser.parse_args()
    if options.here:
        print(json.dumps(rates(options.rounds)))
        return
    figures: dict[str, Any] = {"flops_per_s": {}, "onednn_over_mkl": {}}
    for name, limits in INSTRUCTIONS.items():
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "bench.float32_products",
                "--here",
                f"--rounds={options.rounds}",
            ],
            env={**os.environ, **limits},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        each = json.loads(done.stdout.splitlines()[-1])
        figures["flops_per_s"][name] = each
        times = {key: sum(1 / one[key] for one in each.values()) for key in ("mkl", "onednn")}
        figures["onednn_over_mkl"][name] = times["mkl"] / times["onednn"]
    bars = [
        Bar(f"instructions: {name}; rate of oneDNN over that of MKL", ratio, ">=", 1.0)
        for name, ratio in figures["onednn_over_mkl"].items()
    ]
    write_results("float32_products", figures, bars)


if __name__ == "__main__":
    main()
