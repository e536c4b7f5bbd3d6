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
    _keep_what_is_imported()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        _keep_what_is_imported()


def _keep_what_is_imported() -> None:
    """Exempt all that there is from garbage collection, or each takes 0.3 s for imported modules.

    A whole run collects ten times.
    """
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
