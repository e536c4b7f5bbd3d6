"""One training of a `bench.peers` contender in a separate process, which can be killed."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

OWN = "stillhouse"
PEERS = ("huggingface", "trl_gkd", "trl_distillation")
ROOT = Path(__file__).parents[1]
KINDS = f"{OWN}, {', '.join(PEERS)}; append :N for micro-batches of N windows"
WARM = 2
"""Number of first steps that are not timed."""


@dataclass(frozen=True)
class TrainingJob:
    """The job that every contender reads. windows: .npy file of token ids, one window per row.
    batch: windows per optimizer step. micro: windows per pass; None means the tool's default, which
    is the whole batch for transformers' trainers."""

    teacher: str
    student: str
    windows: str
    out: str
    steps: int
    batch: int
    micro: int | None
    learning_rate: float
    checkpoint_every: int
    threads: int
    seed: int = 0


@dataclass
class Measured:
    """Figures of a training. tokens_per_cpu_s: per second of processor time, which other work on
    the machine affects less. error: message if it failed. resumed_from: checkpoint's name."""

    tokens_per_s: float = 0.0
    tokens_per_cpu_s: float = 0.0
    seconds: float = 0.0
    training_peak_bytes: int = 0
    whole_peak_bytes: int = 0
    resumed_from: str | None = None
    steps: int = 0
    error: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list, repr=False)


def trainer_of(kind: str) -> str:
    return kind.partition(":")[0]


def settings_of(kind: str, job: TrainingJob) -> TrainingJob:
    """Return the job with the micro-batch size given after a colon in the contender's name."""
    micro = kind.partition(":")[2]
    return replace(job, micro=int(micro)) if micro else job


def command(kind: str, python: str, job: Path) -> list[str]:
    if trainer_of(kind) == OWN:
        return [sys.executable, "-m", "bench.peer_own", str(job)]
    return [python, "-m", "bench.peer_trainers", trainer_of(kind), str(job)]


def own_path() -> dict[str, str]:
    """Return environment variables with which a contender finds `bench` and Stillhouse."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(
    kind: str,
    python: str,
    job: TrainingJob,
    *,
    kill_after_step: int | None = None,
    kill_in_checkpoint: bool = False,
) -> Measured:
    """Run a training in a separate process until it ends or is killed."""
    job = settings_of(kind, job)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".json")
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    known = set(checkpoints(out))
    errors = out.with_suffix(".log")
    with errors.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command(kind, python, file),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=own_path(),
        )
    lines = []
    for line in lines_of(process):
        lines.append(line)
        if kill_after_step is not None and line.get("step", 0) >= kill_after_step:
            process.kill()
        if kill_in_checkpoint and line.get("step", 0) >= job.checkpoint_every:
            while process.poll() is None and set(checkpoints(out)) <= known:
                time.sleep(0.001)
            process.kill()
    process.wait()
    found = summarize(lines, job)
    killed = kill_after_step is not None or kill_in_checkpoint
    if process.returncode and not killed:
        said = [one for one in errors.read_text(encoding="utf-8").splitlines() if one.strip()]
        found.error = said[-1] if said else f"status {process.returncode}"
    return found


def lines_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of the output, skipping whatever libraries print."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:  # a dictionary that transformers logs
                continue
            yield found


def checkpoints(out: Path) -> list[Path]:
    return [*out.glob("checkpoint-*"), *out.glob("checkpoints/checkpoint-*")]


def summarize(lines: Sequence[dict[str, Any]], job: TrainingJob) -> Measured:
    def last(key: str) -> Any:
        return next((line[key] for line in reversed(lines) if key in line), None)

    def rate(clock: str) -> float:
        at = [line[clock] for line in lines if clock in line]
        seconds = np.diff(at)[WARM - 1 :].tolist()
        return tokens / statistics.median(seconds) if seconds else 0.0

    length = int(np.load(job.windows, mmap_mode="r").shape[1])
    tokens = job.batch * (length - 1)
    return Measured(
        tokens_per_s=rate("at"),
        tokens_per_cpu_s=rate("cpu"),
        seconds=(last("ended") or 0.0) - (last("began") or 0.0) if last("ended") else 0.0,
        training_peak_bytes=last("training_peak") or 0,
        whole_peak_bytes=max([line["whole_peak"] for line in lines if "whole_peak" in line] + [0]),
        resumed_from=last("resumes_from"),
        steps=last("step") or 0,
        lines=list(lines),
    )


def after_kill(
    kind: str, python: str, job: TrainingJob, whole: Path, *, in_checkpoint: bool
) -> dict[str, Any]:
    """Kill a training, repeat the command, and compare the weights with those of an uninterrupted
    training. difference: the largest of any weight; None if the training did not finish."""
    killed = run(
        kind,
        python,
        job,
        kill_after_step=None if in_checkpoint else job.checkpoint_every + 2,
        kill_in_checkpoint=in_checkpoint,
    )
    again = run(kind, python, job)
    found: dict[str, Any] = {
        "killed_after_step": killed.steps,
        "resumed_from": again.resumed_from,
        "error": again.error,
        "difference": None,
    }
    if not again.error:
        found["difference"] = largest_difference(whole / "model", Path(job.out) / "model")
    shutil.rmtree(job.out)
    return found


def free_space(out: Path, *, keep_model: bool) -> None:
    """Delete a training's files: checkpoints with optimizer moments take gigabytes."""
    for found in out.iterdir():
        if not (keep_model and found.name == "model"):
            shutil.rmtree(found) if found.is_dir() else found.unlink()


def largest_difference(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor.float()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
