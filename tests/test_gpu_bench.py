"""`make bench NAME=gpu` on a CPU with tiny sizes: every part runs, and none stops the others."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import common, gpu, gpu_parts
from bench.gpu import Part, bars, figures_of, measured
from bench.gpu_parts import add_sizes

TINY = ["--device", "cpu", "--rows", "32", "--vocab", "64", "--width", "16", "--rounds", "1"]
TINY += ["--pairs", "tiny", "--context", "32", "--steps", "3"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tries the script on a CPU")


def run_here(part: Part, seconds: float) -> dict[str, Any]:
    """Run the part in this process, which has done the slow imports."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as written:
        patch.setattr(sys, "argv", ["bench.gpu_parts", *part.arguments])
        gpu_parts.main()
    return figures_of(written.getvalue())


@pytest.mark.run
def test_every_part_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measured", run_here)
    monkeypatch.setattr(
        sys, "argv", ["bench.gpu", *TINY, "--minutes", "100", "--only", "loss", "step", "after"]
    )
    gpu.main()
    figures = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["figures"]
    assert not [name for name, found in figures.items() if "failed" in found], figures
    loss = figures["loss"]["V=64, D=16"]
    assert loss["roofline"] > 0
    assert loss["sparse"] > 0
    step = figures["step tiny"]
    assert step["utilization"] > 0
    assert step["planned"] > 0
    assert 0 < figures["after"]["free"] <= 1


def test_a_part_that_fails_or_has_no_time_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = measured(Part("after", ["after", *TINY], 0.0), 1.0)
    assert late["failed"] == "no time was left"
    wrong = tmp_path / "wrong"
    wrong.write_text("#!/bin/sh\necho 'first' >&2\necho 'invalid choice' >&2\nexit 2\n")
    wrong.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrong))
    assert measured(Part("wrong", [], 60.0), 60.0)["failed"] == "invalid choice"


@pytest.mark.run
def test_a_part_is_cut_short_and_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho '{\"first\": 1}'\necho '{\"sec'\nsleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    found = measured(Part("slow", [], 2.0), 2.0)
    assert found["failed"] == "cut short after 2 s"
    assert found["first"] == 1


def test_lines_without_figures_are_ignored() -> None:
    assert figures_of('warning\n{"a": 1}\n{"b": {"c": 2}}\n{"broken"') == {"a": 1, "b": {"c": 2}}


def test_bars_follow_from_the_measured_figures() -> None:
    """Parts without figures have no bars."""
    figures = {
        "settings": {},
        "tests": {"failures": 0, "passed": 30, "skipped": 0},
        "loss": {
            "product_rate": 7e14,
            "V=128000, D=4096": {"roofline": 0.7, "sparse": 0.9, "liger": {"time": 0.5}},
        },
        "step 1.7B:1B": {"utilization": 0.5, "planned": 21e9, "peak": 20e9},
        "step 8B:4B": {"failed": "cut short after 110 s", "planned": 60e9},
        "after": {"free": 0.97},
    }
    met = {bar.name: bar.met for bar in bars(figures, "cuda")}
    assert met == {
        "failed tests": True,
        "tests that ran": True,
        "V=128000, D=4096: share of the roofline": True,
        "V=128000, D=4096: time / Liger": True,
        "V=128000, D=4096: sparse / dense": False,
        "1.7B:1B: MFU of the product rate": True,
        "1.7B:1B: planned / peak, away from 1": True,
        "free for a second process": True,
    }
    assert [bar.name for bar in bars(figures, "cpu")] == ["failed tests"]


def test_the_limits_of_all_parts_fit_into_eight_minutes() -> None:
    parser = argparse.ArgumentParser()
    add_sizes(parser)
    every = gpu.parts(parser.parse_args([], argparse.Namespace(minutes=8.0)))
    assert sum(part.seconds for part in every) <= 8 * 60 - gpu.RESERVE_SECONDS
