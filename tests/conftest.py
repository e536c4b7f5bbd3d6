"""Tiny tensors gain nothing from threads, and two test processes would fight over the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are replayed in this process: a fresh one takes seconds to import transformers."""
    from stillhouse.export import fresh_process as script
    from stillhouse.export import replay, replay_classifier, replay_onnx

    replays = {
        "replay.py": replay.main,
        "replay_onnx.py": replay_onnx.main,
        "replay_classifier.py": replay_classifier.main,
    }

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        script_main = replays.get(Path(command[-2]).name)
        if script_main is None:
            return subprocess.run(command, **options)
        script_main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
