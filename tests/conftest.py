"""What makes many small tests quick: few threads, few processes, and a small heap to collect."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import subprocess
from collections.abc import Iterator

import pytest
import torch

from stillhouse.export import fresh_process as script
from tests import replays

# Tiny tensors gain nothing from threads, and two test processes would compete for the cores.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection: half a million objects, 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _replays_in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "subprocess", replays.IN_THIS_PROCESS)
        yield


@pytest.fixture(autouse=True)
def _replays_in_a_fresh_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("fresh_process"):
        monkeypatch.setattr(script, "subprocess", subprocess)
