"""Under torchrun, `signals`, `synthesize`, and `evaluate` print one result, that of one process.

`make test-processes` runs them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse.data.batches import collate
from stillhouse.data.windows import open_windows
from stillhouse.signals.store import open_store
from stillhouse.teachers.record_store import segments_of
from tests import forks, tiny
from tests.processes.torchruns import torchrun

pytestmark = pytest.mark.processes

SECONDS = 300
SYNTHESIS = {
    "teacher": {"local": {"batch": 2, "precision": "float32"}},
    "prompts": {"path": "prompts.txt", "samples": 2},
    "sampling": {"max_tokens": 8, "temperature": 1.0},
    "filters": {"truncated": False, "exact_duplicates": False},
}


def recipe(folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(folder, **sections)))
    return folder / "recipe.yaml"


def by_one_and_by_two(
    tmp_path: Path, command: str, *options: str, **sections: Any
) -> tuple[Path, Path, str]:
    """Run a command with one process and under torchrun with two.

    Returns both folders and the output of torchrun.
    """
    one, two = (recipe(tmp_path / name, **sections) for name in ("one", "two"))
    alone = forks.stillhouse(command, str(one), *options, cwd=one.parent)
    assert alone.wait(timeout=SECONDS) == 0, alone.errors()[-3000:]
    done = torchrun(two.parent, 2, command, str(two), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error" not in done.stderr
    return one.parent, two.parent, done.stdout


def test_two_processes_record_the_signals_of_one(tmp_path: Path) -> None:
    signals = {"encoding": {"kind": "top_k", "k": 8}}
    one, two, said = by_one_and_by_two(tmp_path, "signals", signals=signals)
    assert said.count("signals ") == 1
    (place,) = two.glob("run/stages/data-*/train")
    windows = open_windows(place)
    segments = segments_of(collate([windows[index] for index in range(len(windows))]))
    left, right = (open_store(folder / "run" / "signals").read(segments) for folder in (one, two))
    assert len(left.ids_NK) > 1000
    assert torch.equal(left.ids_NK, right.ids_NK)
    assert torch.equal(left.log_probs_NK, right.log_probs_NK)


def test_two_processes_synthesize_the_text_of_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prompts = "".join(f"question {number}\n" for number in range(8))
        (tmp_path / name / "prompts.txt").write_text(prompts)
    one, two, said = by_one_and_by_two(tmp_path, "synthesize", synthesize=SYNTHESIS)
    assert len(re.findall(r"^ ?answers +16 of 16", said, re.MULTILINE)) == 1
    assert (two / "synthetic.jsonl").read_bytes() == (one / "synthetic.jsonl").read_bytes()


def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", seed=7)
    options = ("--model", str(tmp_path / "model"), "--json", "found.json")
    one, two, said = by_one_and_by_two(tmp_path, "evaluate", *options)
    assert said.lower().count("perplexity") == 1
    left, right = (json.loads((folder / "found.json").read_text()) for folder in (one, two))
    assert left["models"] == right["models"]
