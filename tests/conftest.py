"""Settings that make many small tests fast: few threads, few processes, little to collect."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import gc
import subprocess
import sys
from collections.abc import Generator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from markupsafe import Markup

# torch and transformers are imported where they are needed: xdist's main process runs no test.

# The same examples in every run; `--hypothesis-profile default` searches for others.
settings.register_profile("same_examples", derandomize=True, database=None)
settings.load_profile("same_examples")


@pytest.fixture(scope="session", autouse=True)
def _fast_and_quiet() -> Iterator[None]:
    import torch
    from transformers.utils import logging

    from stillhouse import hardware
    from stillhouse.classify import classifier_evaluation
    from stillhouse.evaluation import speed
    from stillhouse.export import fresh_process as script
    from stillhouse.report import page
    from tests import forks, replays

    # Tiny tensors gain nothing from threads, and two test processes would compete for the cores.
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "subprocess", replays.IN_THIS_PROCESS)
        patch.setattr(speed, "subprocess", SimpleNamespace(run=forks.measure_memory))
        patch.setattr(hardware, "_MATMUL_SECONDS", 0.01)
        patch.setattr(classifier_evaluation, "_SPEED_SECONDS", 0.01)
        patch.setattr(os, "fsync", lambda handle: None)  # no test cuts the power
        for folder in ("report", "watch"):
            patch.setitem(page.environment(folder).filters, "svg", _named_chart)
        yield


def _named_chart(chart: Any, key: str) -> Markup:
    """A chart's description instead of its drawing, which would take a third of a tiny run."""
    return Markup('<svg role="img" id="{}" aria-label="{}"></svg>').format(key, chart.alt)


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the charts of reports, which tests otherwise omit."""
    from stillhouse.report import page

    monkeypatch.setitem(page.environment("report").filters, "svg", page.svg)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("fresh_process"):
            from stillhouse.evaluation import speed
            from stillhouse.export import fresh_process as script

            patch.setattr(script, "subprocess", subprocess)
            patch.setattr(speed, "subprocess", subprocess)
        return (yield)


_modules = 0
gc.disable()  # importing modules and collecting tests leaves no garbage


def pytest_collection_finish() -> None:
    _exempt_from_collection()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path or len(sys.modules) > _modules:
        _exempt_from_collection()


def _exempt_from_collection() -> None:
    """Exempt all existing objects, mostly those of imported modules, from garbage collection.

    Otherwise, each collection takes 0.3 s, and a complete run has ten.
    """
    global _modules
    gc.collect()
    gc.freeze()
    _modules = len(sys.modules)
