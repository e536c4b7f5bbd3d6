"""Rollouts that vLLM generates; a fake engine with transformers takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.check import check_recipe
from stillhouse.errors import ModelError
from stillhouse.generation import vllm_engine, vllm_rollouts
from stillhouse.generation.rollout_config import VllmRollouts
from stillhouse.training.rollouts import ROLLOUTS
from tests.generation.test_weight_handover import FakeEngine
from tests.teachers.test_hidden_teacher import write
from tests.training.conftest import Setting
from tests.training.test_on_policy import difference, run, settings

pytestmark = pytest.mark.run

GREEDY = {"temperature": 0.0, "max_tokens": 6}
IN_VLLM = {**GREEDY, "generator": {"kind": "vllm", "batch": 3}}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engines that were started."""
    started: list[FakeEngine] = []

    def start(_section: Any, options: dict[str, Any], *_: Any, **__: Any) -> FakeEngine:
        started.append(FakeEngine(Path(options["model"])))
        return started[-1]

    monkeypatch.setattr(vllm_rollouts, "require_vllm", lambda *_, **__: None)
    monkeypatch.setattr(vllm_rollouts, "start_engine", start)
    return started


def test_training_with_vllm_matches_training_with_local_rollouts(
    tmp_path: Path, setting: Setting, engines: list[FakeEngine]
) -> None:
    run(setting, tmp_path / "local", GREEDY)
    run(setting, tmp_path / "vllm", IN_VLLM)
    assert difference(tmp_path / "local", tmp_path / "vllm") < 1e-6
    (engine,) = engines
    assert len(engine.opened) == 2, (
        "one engine: started with the weights of the first window, then given those of the second"
    )
    assert engine.asleep
    assert engine.closed


def test_a_run_stops_if_the_engine_has_other_weights_and_then_resumes(
    tmp_path: Path, setting: Setting, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**IN_VLLM, "window": 1}
    changes: dict[str, Any] = {"checkpoint_every": 1, "learning_rate": 0.05}
    run(setting, tmp_path / "whole", own, **changes)
    with monkeypatch.context() as broken:
        broken.setattr(FakeEngine, "load_weights", lambda self, _: setattr(self, "asleep", False))
        with pytest.raises(ModelError, match="it has different weights"):
            run(setting, tmp_path / "stopped", own, **changes)
    assert (tmp_path / "stopped" / ROLLOUTS).exists()
    assert engines[-1].closed
    run(setting, tmp_path / "stopped", own, **changes)
    assert difference(tmp_path / "whole", tmp_path / "stopped") == 0.0


def test_a_sharded_student_with_vllm_is_rejected() -> None:
    with pytest.raises(ValueError, match="cannot be handed over to vLLM"):
        settings(IN_VLLM, shard="student")


def test_check_reports_a_missing_vllm(tmp_path: Path) -> None:
    own = {"generator": {"kind": "vllm", "python": "nowhere/python"}, "max_tokens": 4}
    found = check_recipe(write(tmp_path, train={"on_policy": own}))
    (one,) = (one for one in found if one.topic == "vLLM")
    assert one.level == "error"
    assert "cannot be run" in one.text


@pytest.mark.parametrize(("processes", "rejected"), [(1, False), (2, True)])
def test_an_engine_under_torchrun_has_one_gpu(
    processes: int, rejected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "probe", lambda: {"vllm": True, "ray": False, "gpus": 4})
    monkeypatch.setattr(vllm_engine, "world_size", lambda: processes)
    section = VllmRollouts(kind="vllm", tensor_parallel=2)
    found = vllm_engine.lacks(section, Path(), key=vllm_engine.ROLLOUTS)
    assert [level for level, _, _ in found] == ["error"] * rejected
    assert all("under torchrun, each process has one" in text for _, text, _ in found)
