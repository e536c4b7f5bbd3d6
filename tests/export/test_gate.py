"""A replay also reports the distance to the teacher, and speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.export import replay
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.gate import REPLAY_TOKENS, Gate, against_teacher, drawn_windows
from tests.clocks import Clock
from tests.export.conftest import ToyWindows


def test_an_export_is_compared_with_the_teacher_on_the_same_tokens(
    trained: Path, tmp_path: Path
) -> None:
    """The teacher is the source itself, so both must have the same measurements."""
    gate = Gate(trained, ToyWindows(), ["word3"], seed=0)
    with against_teacher(gate, trained, vocabulary=64, dtype=torch.float32) as asked:
        assert asked.teacher_logits is not None
        stored = load_file(asked.teacher_logits)
        assert {tuple(logits.shape) for logits in stored.values()} == {(20, 64)}
        result = export_checkpoint(asked, tmp_path / "out", dtype="bfloat16")
    assert not asked.teacher_logits.exists()
    assert result.source_teacher is not None
    assert result.teacher is not None
    assert result.source_teacher.kl == pytest.approx(0, abs=1e-9)
    assert result.source_teacher.top1_agreement == 1
    assert result.teacher.kl == pytest.approx(result.kl, rel=1e-6)
    assert result.teacher.top1_agreement == result.top1_agreement


def test_teacher_rows_past_the_shared_vocabulary_are_ignored(trained: Path, tmp_path: Path) -> None:
    gate = Gate(trained, ToyWindows(), [], seed=0)
    with against_teacher(gate, trained, vocabulary=60, dtype=torch.float32) as asked:
        result = export_checkpoint(asked, tmp_path / "out", dtype="float32")
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.source_teacher is not None
    assert result.source_teacher.kl == pytest.approx(0, abs=1e-9), (
        "both distributions are over 60 tokens"
    )


class LongWindows:
    """Five windows with more tokens than the replay compares in each."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids_L = torch.arange(replay.ROWS + 200)
        return {"input_ids": ids_L, "labels": ids_L, "position_ids": ids_L}


def test_long_windows_are_drawn_until_enough_of_their_tokens_are_compared(trained: Path) -> None:
    windows = replay.by_place(drawn_windows(Gate(trained, LongWindows(), [], seed=0)))
    compared = [len(replay.rows_of(window["labels"])) for window in windows.values()]
    assert compared == [replay.ROWS] * 2
    assert sum(compared) >= REPLAY_TOKENS


def test_speed_is_measured_together_with_the_source(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "time", Clock(tick=1.0))
    result = export_checkpoint(
        Gate(trained, ToyWindows(), [], seed=0), tmp_path / "out", dtype="float32"
    )
    assert result.teacher is None
    assert result.llama_cpp is None
    assert result.decode_tokens_per_s is not None
    assert result.source_decode_tokens_per_s is not None
    ratio = result.decode_tokens_per_s / result.source_decode_tokens_per_s
    assert ratio == 1, "each step takes one second of this clock"
    assert result.decode_tokens_per_s == 1
