"""kill -9 at any moment, then the same command: the same weights, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from stillhouse.training import checkpoints, read_metrics
from tests.forks import Fork
from tests.training.conftest import Setting
from tests.training.test_train import run

OPTIONS = {
    "max_steps": 24,
    "epochs": 5,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "batch_size": 4,
}


def start(setting: Setting, out: Path) -> Fork:
    return Fork(partial(run, setting, out, **OPTIONS))


def kill_when(process: Fork, out: Path, step: int, delay: float) -> None:
    """SIGKILL, `delay` seconds after the checkpoint of a step appears, or a later one."""
    later = [out / "checkpoints" / f"checkpoint-{at}" for at in range(step, 25, 4)]
    while not any(path.exists() for path in later):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_killed_twice_and_resumed_is_bit_for_bit_the_undisturbed_run(
    setting: Setting, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(setting, undisturbed).wait() == 0
    # First in the middle of writing a checkpoint, then between two.
    kill_when(start(setting, killed), killed, 8, 0.0)
    kill_when(start(setting, killed), killed, 16, 0.05)
    assert start(setting, killed).wait() == 0
    assert weights(killed) == weights(undisturbed)

    timing = {"tokens_per_s"}
    rows = [read_metrics(out / "metrics.jsonl") for out in (undisturbed, killed)]
    plain = [[{k: v for k, v in row.items() if k not in timing} for row in side] for side in rows]
    assert plain[0] == plain[1]


@pytest.mark.slow
def test_twelve_kills_at_random_moments(setting: Setting, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(setting, undisturbed).wait() == 0
    for number in range(12):
        process = start(setting, killed)
        try:
            process.wait(timeout=4 + number * 0.37)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert start(setting, killed).wait() == 0
    assert weights(killed) == weights(undisturbed)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_only_a_sealed_checkpoint_counts(tmp_path: Path) -> None:
    checkpoints.seal(checkpoint(tmp_path, 4), checkpoints.Meter(4, 100, 1.5))
    checkpoint(tmp_path, 8)
    found = checkpoints.latest(tmp_path)
    assert found == (tmp_path / "checkpoint-4", checkpoints.Meter(4, 100, 1.5))
    checkpoints.drop_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_truncated_checkpoint_does_not_count(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    checkpoints.seal(path, checkpoints.Meter(4))
    (path / "model.safetensors").write_bytes(b"weig")
    assert checkpoints.latest(tmp_path) is None


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (8, 100, 20):
        checkpoints.seal(checkpoint(tmp_path, step), checkpoints.Meter(step))
    checkpoints.keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]
    shutil.rmtree(tmp_path / "checkpoint-100")
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found[1].step == 20


def test_metrics_after_the_checkpoint_are_dropped_and_a_cut_line_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "lo')
    file = checkpoints.MetricsFile(path, keep_to_step=4)
    file.append({"step": 5, "loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert read_metrics(path)[-1]["loss"] == 0.5
