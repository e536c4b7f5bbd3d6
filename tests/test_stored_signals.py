"""Runs whose teacher is asked once: training reads from the store what it would hear live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stillhouse
from stillhouse import account
from stillhouse.errors import SignalError
from stillhouse.runfolder import Stage
from stillhouse.runner import RunResult
from stillhouse.signals.verify import verify
from stillhouse.stages import STORE
from stillhouse.teachers import scoring
from stillhouse.training import read_metrics
from tests import tiny


def run(raw: dict[str, Any]) -> RunResult:
    result = stillhouse.run(raw)
    assert result is not None
    return result


def stages(result: RunResult) -> dict[str, Stage]:
    return {stage.name: stage for stage in result.stages}


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(stages(result)["train"].path / "model" / "model.safetensors")


def recipe(folder: Path, encoding: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return tiny.recipe(folder, signals={"encoding": encoding}, **sections)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """254 of 260 tokens are stored: all but a thousandth of the teacher's mass."""
    folder = tmp_path_factory.mktemp("stored")
    return folder, run(recipe(folder, {"kind": "top_k", "k": 254}))


def test_a_nearly_complete_store_trains_the_student_of_a_live_teacher(
    stored: tuple[Path, RunResult],
) -> None:
    folder, result = stored
    live = run(tiny.recipe(folder, folder=str(folder / "live")))
    steps = [
        [row for row in read_metrics(stages(each)["train"].path / "metrics.jsonl") if "loss" in row]
        for each in (result, live)
    ]
    for ours, theirs in zip(*steps, strict=True):
        assert ours["forward_kl"] == pytest.approx(theirs["forward_kl"], rel=0.01)
    kl, expected = (r.evaluation.result("student").fidelity.kl for r in (result, live))
    assert kl == pytest.approx(expected, rel=0.01)


def test_training_from_a_store_pays_for_no_teacher(stored: tuple[Path, RunResult]) -> None:
    _, result = stored
    trained, student = stages(result)["train"], stages(result)["student"]
    size = student.summary["parameters"]["head_once"]
    assert trained.cost.flops == account.training_flops(size, trained.cost.tokens)
    assert stages(result)["signals"].cost.tokens == trained.cost.tokens


def test_a_second_student_and_more_epochs_ask_nothing_again(
    stored: tuple[Path, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = stored
    monkeypatch.setattr(scoring, "dense_signal", _never)
    student = {"ffn_size": 48}
    encoding = {"kind": "top_k", "k": 254}
    second = run(recipe(folder, encoding, student=student, train={"epochs": 2}))
    assert stages(second)["signals"].reused
    assert not stages(second)["train"].reused


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the teacher was asked")


def test_recording_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe(tmp_path, {"kind": "threshold", "bytes": 60})
    monkeypatch.setattr(scoring, "SCORED_TOGETHER", 320)
    asked: list[int] = []
    dense_signal = scoring.dense_signal

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        if len(asked) == 25:
            raise KeyboardInterrupt
        asked.append(1)
        return dense_signal(*args, **kwargs)

    monkeypatch.setattr(scoring, "dense_signal", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(raw)
    before = list(asked)
    asked.extend([0] * 100)  # never 25 again
    result = run(raw)
    store = stages(result)["signals"].path / STORE
    assert verify(store) == []
    whole = run({**raw, "folder": str(tmp_path / "whole")})
    assert all(torch.equal(weights(result)[name], weights(whole)[name]) for name in weights(whole))
    windows = 96 // 10 + 1
    assert len(before) == 25
    assert len(asked) - 125 < 17 + 2 * windows + 17


def test_a_threshold_is_tuned_to_the_size_asked_for(tmp_path: Path) -> None:
    result = run(recipe(tmp_path, {"kind": "threshold", "bytes": 60}))
    summary = stages(result)["signals"].summary
    assert summary["squared_bias"] == 0
    # Keys, offsets and checksums come on top; segments here have 11 tokens, and 28 bytes each.
    assert 60 * 0.9 < summary["bytes"] < 60 * 1.1 + 12


@pytest.mark.parametrize(
    ("terms", "encoding", "message"),
    [
        ([{"divergence": "jsd"}], {"kind": "threshold"}, "jsd cannot be taken from signals"),
        ([{"divergence": "adaptive_kl"}], {"kind": "top_k"}, "adaptive_kl cannot be taken"),
        ([{"kind": "hidden_states"}], {"kind": "top_k"}, "intermediate layers"),
        ([{}, {"divergence": "jsd", "temperature": 2}], {"kind": "top_k"}, "temperatures 1, 2"),
    ],
)
def test_terms_that_a_store_cannot_serve_are_refused_before_anything_is_spent(
    tmp_path: Path, terms: list[dict[str, Any]], encoding: dict[str, Any], message: str
) -> None:
    with pytest.raises(SignalError, match=message) as caught:
        run(recipe(tmp_path, encoding, objective={"terms": terms}))
    assert caught.value.fix
    assert not list((tmp_path / "run" / "stages").iterdir())
