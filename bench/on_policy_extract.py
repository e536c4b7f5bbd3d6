"""Field F1 of the student of recipes/extract.yaml, with and without own text.

    make bench NAME=on_policy_extract ARGS="--seeds 0 1"

The teacher's examples are in the student's prompt too (task.student_sees: all), since own text is
scored under the student's prompt. Half of the rows in each step of one student are its own answers.
Both students take the same number of optimizer steps, unless --own-set changes that: answers are
short, so rows of own text have fewer supervised tokens. Both have one run folder, so that the
teacher answers once, and what is finished is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import stillhouse
from bench.common import Bar, write_results
from stillhouse.evaluation.answers import AnswersEvaluation

RECIPE = Path(__file__).parents[1] / "recipes" / "extract.yaml"
COMMON = ("task.student_sees=all", "data.context=512")
KINDS = {"data": (), "own_text": ("train.on_policy.share=0.5", "train.on_policy.max_tokens=48")}


def measure(options: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    given = [
        f"seed={seed}",
        f"folder={options.folder.resolve()}",
        *COMMON,
        *KINDS[kind],
        *options.set,
        *(options.own_set if kind == "own_text" else ()),
    ]
    result = stillhouse.run(RECIPE, overrides=given)
    assert result is not None
    assert isinstance(result.evaluation, AnswersEvaluation)
    student = result.evaluation.of("student")
    assert student is not None
    (trained,) = (stage for stage in result.stages if stage.name == "train")
    return {"kind": kind, "seed": seed, "tokens": trained.cost.tokens, **student.figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path("runs/on_policy_extract"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--own-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="overrides for the student that trains on own text, after those of --set",
    )
    parser.add_argument("--name", default="on_policy_extract", help="name of the results file")
    options = parser.parse_args()
    figures = [measure(options, kind, seed) for seed in options.seeds for kind in KINDS]

    def mean(kind: str, key: str) -> float:
        return statistics.fmean(each[key] for each in figures if each["kind"] == kind)

    more = mean("own_text", "field_f1") - mean("data", "field_f1")
    tokens = mean("own_text", "tokens") / mean("data", "tokens")
    bars = [
        Bar("field F1 with own text, less that without (mean over seeds)", more, ">=", 0.0),
        Bar("trained tokens with own text, over those without", tokens, "<=", 1.0),
    ]
    write_results(options.name, figures, bars, options.seeds)


if __name__ == "__main__":
    main()
