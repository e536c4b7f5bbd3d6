"""What becomes of real, odd and damaged inputs: nothing may be wrong in silence.

    make bench NAME=inputs
    python -m bench.inputs --seed 1 --count 30

Data files, labelled tables, prompts, model folders, GGUF files and recipes are made by generators
with a seed. Each generator knows what has to come out, without the code that is tested. A trial
that takes too long is ended. Every failure is listed with the numbers that make it again:

    python -m bench.inputs --seed 1 --only data:17
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table

from bench.common import Bar, write_results
from bench.input_trials.trial import BARS, MEANING, OUTCOMES, Result
from bench.input_trials.workers import Family, run_all, run_one

FAMILIES = {
    family.name: family
    for family in (
        Family("data", "bench.input_trials.data_trials", 20.0),
        Family("tables", "bench.input_trials.table_trials", 20.0),
        Family("models", "bench.input_trials.model_trials", 30.0),
        Family("gguf", "bench.input_trials.gguf_trials", 30.0),
        Family("recipes", "bench.input_trials.recipe_trials", 5.0),
    )
}
COUNTS = {"data": 240, "tables": 60, "models": 240, "gguf": 60, "recipes": 2000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--count", type=int, help="trials of each family, in place of the usual")
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--only", nargs="+", default=[], help="FAMILY:NUMBER, shown whole")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.only:
        show(options.only, options.seed[0])
        return
    counts = {name: options.count or COUNTS[name] for name in options.family}
    results: list[tuple[int, Result]] = []
    for seed in options.seed:
        results += [(seed, result) for result in run(counts, seed, options.processes)]
    print_table([result for _, result in results])
    figures = summary(results)
    found = Counter(result.outcome for _, result in results)
    bars = [Bar(f"{name}: {MEANING[name]}", found[name], "<=", 0) for name in BARS]
    if options.count or options.family != list(FAMILIES):
        print("a part of the trials: nothing is written")
        return
    write_results("inputs", figures, bars, seeds=options.seed)


def run(counts: dict[str, int], seed: int, processes: int = 2) -> Iterator[Result]:
    """The results of the first trials of each family; failures are printed as they come."""
    jobs = [(FAMILIES[name], number) for name, count in counts.items() for number in range(count)]
    for result in run_all(jobs, seed, processes):
        if result.outcome in BARS:
            detail = result.detail[-700:] if result.outcome == "traceback" else result.detail[:700]
            where = f"{result.family}:{result.number}"
            print(f"--- {result.outcome}  {where} seed {seed}  {result.name}\n{detail}", flush=True)
        yield result


def show(names: Sequence[str], seed: int) -> None:
    for name in names:
        family, _, number = name.partition(":")
        result = run_one(FAMILIES[family], seed, int(number))
        print(f"{name} {result.name}: {result.outcome}\n{result.detail}\n")


def print_table(results: Sequence[Result]) -> None:
    table = Table(title="Inputs")
    table.add_column("family")
    for outcome in OUTCOMES:
        table.add_column(f"{outcome} (0)" if outcome in BARS else outcome, justify="right")
    for family in dict.fromkeys(result.family for result in results):
        found = Counter(result.outcome for result in results if result.family == family)
        table.add_row(family, *(str(found[outcome]) for outcome in OUTCOMES))
    Console().print(table)


def summary(results: Sequence[tuple[int, Result]]) -> dict[str, object]:
    """Counts of outcomes by family and seed, and every failure."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for seed, result in results:
        row = counts.setdefault(result.family, {}).setdefault(str(seed), dict.fromkeys(OUTCOMES, 0))
        row[result.outcome] += 1
    failures = [
        {"seed": seed, **asdict(replace(result, detail=result.detail[:300]))}
        for seed, result in results
        if result.outcome in BARS
    ]
    return {"meaning": MEANING, "outcomes": counts, "failures": failures}


if __name__ == "__main__":
    main()
