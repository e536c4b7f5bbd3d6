"""The command line of a benchmark with seeded trials, and its table and results."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import Bar, commit, earlier, without_paths, write_results
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
    """Run the trials that the command line selects.

    The results of a complete run are saved; with `--add`, so are those of some families if all of
    their trials have run, replacing their previous results.
    """
    families = list(bench.families)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--count", type=int, help="trials of each family, instead of the default")
    parser.add_argument("--family", nargs="+", choices=families, default=families)
    parser.add_argument("--only", nargs="+", default=[], help="FAMILY:NUMBER, shown whole")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="keep the results of other families")
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
    if options.count or (set(options.family) != set(families) and not options.add):
        print("a part of the trials: nothing is written")
        return
    parts = _parts(results) | (_others(bench, options.family) if options.add else {})
    parts = {name: parts[name] for name in families if name in parts}
    found = Counter[str]()
    for part in parts.values():
        for outcomes in part["outcomes"].values():
            found.update(outcomes)
    bars = [Bar(f"{name}: {bench.meaning[name]}", found[name], "<=", 0) for name in BARS]
    seeds = sorted({int(seed) for part in parts.values() for seed in part["outcomes"]})
    figures = {"meaning": dict(bench.meaning), "families": parts}
    write_results(bench.name, figures, bars, seeds=seeds)


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


def _parts(results: Sequence[tuple[int, Result]]) -> dict[str, Any]:
    """By family: the commit, the counts of outcomes by seed, and every failure."""
    parts: dict[str, Any] = {}
    for seed, result in results:
        empty = {"commit": commit(), "outcomes": {}, "failures": []}
        part = parts.setdefault(result.family, empty)
        row = part["outcomes"].setdefault(str(seed), dict.fromkeys(OUTCOMES, 0))
        row[result.outcome] += 1
        if result.outcome in BARS:
            shown = asdict(replace(result, detail=without_paths(result.detail)[:300]))
            part["failures"].append({"seed": seed, **shown})
    return parts


def _others(bench: TrialBench, families: Sequence[str]) -> dict[str, Any]:
    """The saved results of other families."""
    parts = earlier(bench.name).get("figures", {}).get("families", {})
    return {name: part for name, part in parts.items() if name not in families}
