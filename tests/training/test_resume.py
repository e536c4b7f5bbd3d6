"""After `kill -9` at any moment, the same command gives the same weights bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from stillhouse.training import checkpoints
from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.resuming import Housekeeping
from tests import forks
from tests.forks import Fork
from tests.training.conftest import Setting
from tests.training.test_train import run

OPTIONS: dict[str, Any] = {
    "max_steps": 24,
    "epochs": 5,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "batch_size": 4,
}


def start(setting: Setting, out: Path) -> Fork:
    return Fork(partial(run, setting, out, **OPTIONS))


def kill_when(process: Fork, reached: Path, delay: float) -> None:
    """Sends SIGKILL `delay` seconds after a path appears."""
    while not reached.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.run
def test_a_run_killed_twice_equals_an_undisturbed_one_bit_for_bit(
    setting: Setting, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(setting, undisturbed).wait() == 0
    # First in the middle of writing a checkpoint, then between two.
    kill_when(start(setting, killed), killed / "checkpoints" / "checkpoint-8", 0.0)
    kill_when(start(setting, killed), killed / "checkpoints" / "checkpoint-16", 0.05)
    assert start(setting, killed).wait() == 0
    assert weights(killed) == weights(undisturbed)

    timing = {"tokens_per_s"}
    rows = [read_metrics(out / "metrics.jsonl") for out in (undisturbed, killed)]
    plain = [[{k: v for k, v in row.items() if k not in timing} for row in side] for side in rows]
    assert plain[0] == plain[1]


@pytest.mark.slow
def test_a_run_killed_at_many_moments_equals_an_undisturbed_one(
    setting: Setting, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(setting, undisturbed).wait() == 0
    kills = 0
    for number in range(12):
        process = start(setting, killed)
        try:
            process.wait(timeout=0.2 + 0.15 * number)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills
    assert start(setting, killed).wait() == 0
    assert weights(killed) == weights(undisturbed)


SHORT: dict[str, Any] = {
    "batch_size": 4,
    "max_steps": 12,
    "checkpoint_every": 4,
    "keep_checkpoints": 3,
    "evaluate_every": 4,
}


def train_or_resume(setting: Setting, out: Path) -> list[dict[str, float]]:
    """Trains or resumes, and returns the metrics without those that depend on time."""
    run(setting, out, **SHORT)
    return metrics(out)


def metrics(out: Path) -> list[dict[str, float]]:
    rows = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


@pytest.fixture(scope="module")
def trained(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run of 12 steps with checkpoints at 4, 8, and 12."""
    out = tmp_path_factory.mktemp("trained")
    train_or_resume(setting, out)
    return out


def fill_with_garbage(file: Path) -> None:
    """Also seals the checkpoint again, so that the damage shows only when it is loaded."""
    file.write_bytes(b"\x93garbage" * (file.stat().st_size // 8) + b"!" * (file.stat().st_size % 8))
    recorded = json.loads((file.parent / checkpoints.COMPLETE).read_text())["meter"]
    (file.parent / checkpoints.COMPLETE).unlink()
    checkpoints.seal(file.parent, checkpoints.Meter(**recorded))


@pytest.mark.run
@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
)
def test_training_falls_back_from_a_checkpoint_that_does_not_load(
    setting: Setting, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    fill_with_garbage(out / "checkpoints" / "checkpoint-8" / file)
    rows = train_or_resume(setting, out)
    said = capfd.readouterr().err
    assert "checkpoint-8 cannot be loaded" in said
    assert "going back to checkpoint-4" in said
    assert weights(out) == weights(trained)
    assert [row["step"] for row in rows] == [row["step"] for row in metrics(trained)]
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {"checkpoint-4", "checkpoint-8", "checkpoint-12", "damaged-checkpoint-8"}


def test_a_run_killed_after_its_last_checkpoint_trains_no_further_step(
    setting: Setting, trained: Path, tmp_path: Path
) -> None:
    """The process was killed between its last checkpoint and the saved model."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "model")
    assert train_or_resume(setting, out) == metrics(trained)
    assert weights(out) == weights(trained)


def test_training_starts_over_if_no_checkpoint_loads(
    setting: Setting, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "model")
    for step in (4, 8, 12):
        fill_with_garbage(out / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    train_or_resume(setting, out)
    assert "training starts over" in capfd.readouterr().err
    assert weights(out) == weights(trained)


def test_running_out_of_memory_is_not_mistaken_for_a_damaged_checkpoint(
    setting: Setting, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", fails)
    with pytest.raises(torch.OutOfMemoryError):
        train_or_resume(setting, out)
    assert (out / "checkpoints" / "checkpoint-12").is_dir()


@pytest.mark.run
def test_all_processes_fall_back_if_one_cannot_load(setting: Setting, tmp_path: Path) -> None:
    """Each process has its own file of random states."""
    out = tmp_path / "out"
    options = {**OPTIONS, "max_steps": 10, "evaluate_every": None, "keep_checkpoints": 3}
    finished = []
    for _ in range(2):
        first, second = forks.two_ranks(partial(run, setting, out, **options))
        for rank in (first, second):
            assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]
        shutil.rmtree(out / "checkpoints" / "checkpoint-10")
        last = out / "checkpoints" / "checkpoint-8"
        sealed = json.loads((last / checkpoints.COMPLETE).read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= sealed.keys()
        finished.append(weights(out))
        shutil.rmtree(out / "model")
        fill_with_garbage(last / "rng_state_1.pth")
    said = first.communicate()[1]
    assert "checkpoint-8 cannot be loaded" in said
    assert "going back to checkpoint-4" in said
    assert (out / "checkpoints" / "damaged-checkpoint-8").is_dir()
    assert finished[0] == finished[1]


def test_a_checkpoint_is_sealed_once_every_process_has_written_its_part(tmp_path: Path) -> None:
    """The checkpoint has a folder with one file per process, as sharded state dicts have."""
    shards = checkpoint(tmp_path, 4) / "pytorch_model_fsdp_0"

    class Accelerator:
        def wait_for_everyone(self) -> None:
            shards.mkdir()
            for rank in range(2):
                (shards / f"__{rank}_0.distcp").write_bytes(b"shard")

    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        meter=lambda: checkpoints.Meter(4),
        metrics=checkpoints.Metrics(),
        forget=lambda step: forgotten.append(step),
    )
    forgotten: list[int] = []
    housekeeping = Housekeeping(trainer, 3, lambda: None)
    state = SimpleNamespace(is_world_process_zero=True, global_step=4)
    housekeeping.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert forgotten == [4]
    (shards / "__1_0.distcp").write_bytes(b"sha")
    assert checkpoints.latest(tmp_path) is None


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_only_sealed_checkpoints_are_used(tmp_path: Path) -> None:
    checkpoints.seal(checkpoint(tmp_path, 4), checkpoints.Meter(4, 100, 1.5))
    checkpoint(tmp_path, 8)
    found = checkpoints.latest(tmp_path)
    assert found == (tmp_path / "checkpoint-4", checkpoints.Meter(4, 100, 1.5))
    checkpoints.drop_unusable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_truncated_checkpoint_is_not_used(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    checkpoints.seal(path, checkpoints.Meter(4))
    (path / "model.safetensors").write_bytes(b"weig")
    assert checkpoints.latest(tmp_path) is None


def test_a_flipped_bit_sets_a_checkpoint_aside(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 8):
        checkpoints.seal(checkpoint(tmp_path, step), checkpoints.Meter(step))
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"weightr")
    found = checkpoints.latest(tmp_path)
    assert found == (tmp_path / "checkpoint-4", checkpoints.Meter(4))
    checkpoints.drop_unusable(tmp_path)
    assert "checkpoint-8 cannot be loaded (model.safetensors is damaged)" in capfd.readouterr().err
    assert (tmp_path / "damaged-checkpoint-8").is_dir()


@pytest.mark.parametrize("change", [("4", "5"), ("{", "["), ('"meter"', '"mater"')])
def test_a_checkpoint_with_a_changed_seal_is_not_used(
    tmp_path: Path, change: tuple[str, str]
) -> None:
    path = checkpoint(tmp_path, 4)
    checkpoints.seal(path, checkpoints.Meter(4))
    seal = path / checkpoints.COMPLETE
    seal.write_text(seal.read_text().replace(*change, 1))
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


@pytest.mark.parametrize("damage", [b"0.5", b"\xff", b"[7]\n", b""])
def test_damaged_metrics_are_restored_from_the_checkpoint(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = checkpoints.Metrics(path)
    metrics.append({"step": 4, "loss": 0.25})
    folder = checkpoint(tmp_path / "checkpoints", 4)
    checkpoints.seal(folder, checkpoints.Meter(4), metrics)
    path.write_bytes(path.read_bytes().replace(b"0.25", damage))
    assert checkpoints.Metrics(path, keep_to_step=4).rows == [{"step": 4, "loss": 0.25}]
    assert checkpoints.latest(folder.parent) is not None


@pytest.mark.parametrize("line", [b"7", b'{"loss": 1}', b"\xff", b'{"step": "4"}'])
def test_metrics_are_read_up_to_a_damaged_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 1}]


def test_metrics_after_the_checkpoint_and_truncated_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = checkpoints.Metrics(path)
    for step in range(1, 7):
        metrics.append({"step": step, "loss": 1.0 / step})
        if step == 4:
            sealed = checkpoint(tmp_path / "checkpoints", 4)
            checkpoints.seal(sealed, checkpoints.Meter(4), metrics)
    path.write_text(path.read_text() + '{"step": 7, "lo')
    file = checkpoints.Metrics(path, keep_to_step=4)
    file.append({"step": 5, "loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert read_metrics(path)[-1]["loss"] == 0.5


def test_training_that_starts_over_drops_earlier_metrics(tmp_path: Path) -> None:
    """Metrics of own text before the first step have step 0."""
    for _ in range(2):
        metrics = checkpoints.Metrics(tmp_path / "metrics.jsonl")
        metrics.append({"step": 0, "own_answers": 8})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "own_answers": 8}]


def test_other_folders_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-8.old", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").touch()
    found = [path.name for path in checkpoints.checkpoints_in(tmp_path)]
    assert found == ["checkpoint-10", "checkpoint-2"]
    assert checkpoints.oldest_step(tmp_path) == 2
    checkpoints.keep_newest(tmp_path, 1)
    assert not (tmp_path / "checkpoint-2").exists()
    assert len(list(tmp_path.iterdir())) == 4
