"""The committed results of benchmarks contain no absolute paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.common import RESULTS, without_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/runs/demo", "demo"),
        ("--teacher=/home/me/models/a", "--teacher=a"),
        ('File "/usr/lib/python3.11/x.py", line 1', 'File "x.py", line 1'),
        ("where: file:///home/me/a.gguf", "where: a.gguf"),
        ("bytes/second, nats/token", "bytes/second, nats/token"),
        ("http://127.0.0.1:8000/v1/chat", "http://127.0.0.1:8000/v1/chat"),
        ("runs/demo/model", "runs/demo/model"),
    ],
)
def test_absolute_paths_are_shortened(text: str, shown: str) -> None:
    assert without_paths({text: [text, 1, None]}) == {shown: [shown, 1, None]}


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_committed_results_contain_no_absolute_path(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert without_paths(result) == result
