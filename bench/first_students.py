"""Learning rates for a recipe written by `stillhouse init`, compared.

    stillhouse init --job distill --data own.jsonl --size large --out own.yaml
    python -m bench.first_students own.yaml --rates 3e-5 5e-5 1e-4

One student is pruned from the teacher and trained once with each rate. The results contain its KL
on the recipe's held-out text before and after each training, and its answers to the recipe's
prompts. With the same --folder, finished work is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import stillhouse
from bench.common import Bar, write_results
from stillhouse.evaluation.results import Evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rates", nargs="+", default=["3e-5", "5e-5", "1e-4"])
    parser.add_argument("--folder", type=Path, default=Path("runs/first_students"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", default="first_students", help="name of the results file")
    options = parser.parse_args()
    figures: dict[str, Any] = {"recipe": options.recipe.read_text(encoding="utf-8")}
    for rate in options.rates:
        figures[rate] = measure(options.recipe, options.folder, [*options.set, rate_of(rate)])
        print(rate, {role: round(one["kl"], 4) for role, one in figures[rate]["models"].items()})
    last = [figures[rate]["models"] for rate in options.rates]
    best = min(models["student"]["kl"] / models["untrained"]["kl"] for models in last)
    write_results(options.name, figures, [Bar("KL, best rate / before training", best, "<=", 0.95)])


def rate_of(rate: str) -> str:
    return f"train.learning_rate={rate}"


def measure(recipe: Path, folder: Path, settings: list[str]) -> dict[str, Any]:
    overrides = [f"folder={folder}", "evaluate.speed=false", *settings]
    result = stillhouse.run(recipe, overrides=overrides)
    assert result is not None
    found = result.evaluation
    assert isinstance(found, Evaluation)
    models = {
        model.role: {
            "kl": model.fidelity.kl,
            "top1_agreement": model.fidelity.top1_agreement,
            "perplexity": model.fidelity.perplexity,
            "tokens": model.fidelity.tokens,
        }
        for model in found.models
    }
    answers = {one.prompt: one.answers for one in found.generations}
    seconds = {stage.name: round(stage.cost.seconds, 1) for stage in result.stages}
    return {"models": models, "answers": answers, "seconds": seconds}


if __name__ == "__main__":
    main()
