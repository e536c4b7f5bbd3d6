"""What makes many small tests quick: few threads, few processes, and a small heap to collect."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stillhouse.export import replay, replay_classifier, replay_onnx, script

# Tiny tensors gain nothing from threads, and two test processes would compete for the cores.
torch.set_num_threads(1)

REPLAYS = {
    "replay.py": replay.main,
    "replay_onnx.py": replay_onnx.main,
    "replay_classifier.py": replay_classifier.main,
}


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection: half a million objects, 0.3 s."""
    gc.collect()
    gc.freeze()


def _replay_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    replay_main = REPLAYS.get(Path(command[-2]).name)
    if replay_main is None:
        return subprocess.run(command, **options)
    replay_main(Path(command[-1]))
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(scope="session", autouse=True)
def _replays_in_this_process() -> Iterator[None]:
    """Replay exports in the test's process: a fresh one takes seconds to import transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "subprocess", SimpleNamespace(run=_replay_here))
        yield


@pytest.fixture(autouse=True)
def _replays_in_a_fresh_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("fresh_process"):
        monkeypatch.setattr(script, "subprocess", subprocess)
