"""The command line of a benchmark that is made of seeded trials, and its table and results."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from bench.common import Bar, write_results
from bench.input_trials.trial import BARS, OUTCOMES, Result
from bench.input_trials.workers import Family, run_all, run_one


@dataclass(frozen=True)
class TrialBench:
    """A benchmark `bench/NAME.py`. counts: trials of each family. meaning: of each outcome."""

    name: str
    families: Mapping[str, Family]
    counts: Mapping[str, int]
    meaning: Mapping[str, str]


def run_command(bench: TrialBench, description: str | None) -> None:
    """Runs the trials that the command line asks for; a run of them all is written down."""
    families = list(bench.families)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--count", type=int, help="trials of each family, in place of the usual")
    parser.add_argument("--family", nargs="+", choices=families, default=families)
    parser.add_argument("--only", nargs="+", default=[], help="FAMILY:NUMBER, shown whole")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.only:
        _show(bench, options.only, options.seed[0])
        return
    counts = {name: options.count or bench.counts[name] for name in options.family}
    results: list[tuple[int, Result]] = []
    for seed in options.seed:
        jobs = [
            (bench.families[name], number)
            for name, count in counts.items()
            for number in range(count)
        ]
        results += [(seed, result) for result in _run(jobs, seed, options.processes)]
    _print_table(bench.name.capitalize(), [result for _, result in results])
    found = Counter(result.outcome for _, result in results)
    bars = [Bar(f"{name}: {bench.meaning[name]}", found[name], "<=", 0) for name in BARS]
    if options.count or options.family != families:
        print("a part of the trials: nothing is written")
        return
    write_results(bench.name, _summary(bench, results), bars, seeds=options.seed)


def _run(jobs: Sequence[tuple[Family, int]], seed: int, processes: int) -> Iterator[Result]:
    """The results as they come; failures are printed at once."""
    for result in run_all(jobs, seed, processes):
        if result.outcome in BARS:
            detail = result.detail[-700:] if result.outcome == "traceback" else result.detail[:700]
            where = f"{result.family}:{result.number}"
            print(f"--- {result.outcome}  {where} seed {seed}  {result.name}\n{detail}", flush=True)
        yield result


def _show(bench: TrialBench, names: Sequence[str], seed: int) -> None:
    for name in names:
        family, _, number = name.partition(":")
        result = run_one(bench.families[family], seed, int(number))
        print(f"{name} {result.name}: {result.outcome}\n{result.detail}\n")


def _print_table(title: str, results: Sequence[Result]) -> None:
    table = Table(title=title)
    table.add_column("family")
    for outcome in OUTCOMES:
        table.add_column(f"{outcome} (0)" if outcome in BARS else outcome, justify="right")
    for family in dict.fromkeys(result.family for result in results):
        found = Counter(result.outcome for result in results if result.family == family)
        table.add_row(family, *(str(found[outcome]) for outcome in OUTCOMES))
    Console().print(table)


def _summary(bench: TrialBench, results: Sequence[tuple[int, Result]]) -> dict[str, object]:
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
    return {"meaning": dict(bench.meaning), "outcomes": counts, "failures": failures}
