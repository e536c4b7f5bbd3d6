"""The command line, table, and results of a benchmark with seeded trials."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import Bar, commit, earlier, without_paths, write_results
from bench.input_trials.trial import BARS, OUTCOMES, Result
from bench.input_trials.workers import Family, run_all, run_one

Timed = tuple[int, Result, float]
"""The seed, the result, and the seconds since the previous result."""


@dataclass(frozen=True)
class TrialBench:
    """A benchmark `bench/NAME.py`. counts: trials of each family. meaning: description of each
    outcome. minutes: time limit for all families in sequence."""

    name: str
    families: Mapping[str, Family]
    counts: Mapping[str, int]
    meaning: Mapping[str, str]
    minutes: float | None = None


def run_command(bench: TrialBench, description: str | None) -> None:
    """Run the trials that the command line selects.

    The results of a complete run are saved; with `--add`, so are those of some families if all of
    their trials have run, replacing their previous results.
    """
    families = list(bench.families)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or more seeds")
    parser.add_argument("--count", type=int, help="number of trials per family")
    parser.add_argument("--family", nargs="+", choices=families, default=families)
    parser.add_argument(
        "--only", nargs="+", default=[], help="trials to show in full: FAMILY:NUMBER"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="keep the results of other families")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.only:
        _show(bench, options.only, options.seed[0])
        return
    counts = {name: options.count or bench.counts[name] for name in options.family}
    results: list[Timed] = []
    for seed in options.seed:
        jobs = [
            (bench.families[name], number)
            for name, count in counts.items()
            for number in range(count)
        ]
        results += _run(jobs, seed, options.processes)
    _print_table(bench.name.capitalize(), results)
    if options.count or (set(options.family) != set(families) and not options.add):
        print("only part of the trials ran: results are not written")
        return
    parts = _parts(results, options.processes) | (
        _others(bench, options.family) if options.add else {}
    )
    parts = {name: parts[name] for name in families if name in parts}
    found = Counter[str]()
    for part in parts.values():
        for outcomes in part["outcomes"].values():
            found.update(outcomes)
    bars = [Bar(f"{name}: {bench.meaning[name]}", found[name], "<=", 0) for name in BARS]
    bars += time_bar(bench, parts)
    seeds = sorted({int(seed) for part in parts.values() for seed in part["outcomes"]})
    figures = {"meaning": dict(bench.meaning), "families": parts}
    write_results(bench.name, figures, bars, seeds=seeds)


def _run(jobs: Sequence[tuple[Family, int]], seed: int, processes: int) -> Iterator[Timed]:
    """Yield results as they finish; print failures immediately."""
    last = time.monotonic()
    for result in run_all(jobs, seed, processes):
        if result.outcome in BARS:
            detail = result.detail[-700:] if result.outcome == "traceback" else result.detail[:700]
            where = f"{result.family}:{result.number}"
            print(f"--- {result.outcome}  {where} seed {seed}  {result.name}\n{detail}", flush=True)
        now = time.monotonic()
        yield seed, result, now - last
        last = now


def _show(bench: TrialBench, names: Sequence[str], seed: int) -> None:
    for name in names:
        family, _, number = name.partition(":")
        result = run_one(bench.families[family], seed, int(number))
        print(f"{name} {result.name}: {result.outcome}\n{result.detail}\n")


def _print_table(title: str, results: Sequence[Timed]) -> None:
    table = Table(title=title)
    table.add_column("family")
    for outcome in OUTCOMES:
        table.add_column(f"{outcome} (0)" if outcome in BARS else outcome, justify="right")
    table.add_column("minutes", justify="right")
    table.add_column("CPU minutes", justify="right")
    for family in dict.fromkeys(result.family for _, result, _ in results):
        own = [(result, seconds) for _, result, seconds in results if result.family == family]
        found = Counter(result.outcome for result, _ in own)
        took = sum(seconds for _, seconds in own), sum(result.cpu_seconds for result, _ in own)
        times = (f"{seconds / 60:.1f}" for seconds in took)
        table.add_row(family, *(str(found[outcome]) for outcome in OUTCOMES), *times)
    Console().print(table)


def _parts(results: Sequence[Timed], processes: int) -> dict[str, Any]:
    """Return each family's commit, outcome counts and time by seed, and failures."""
    parts: dict[str, Any] = {}
    for seed, result, seconds in results:
        empty = {
            "commit": commit(), "processes": processes, "outcomes": {}, "seconds": {},
            "cpu_seconds": {}, "failures": [],
        }  # fmt: skip
        part = parts.setdefault(result.family, empty)
        row = part["outcomes"].setdefault(str(seed), dict.fromkeys(OUTCOMES, 0))
        row[result.outcome] += 1
        for name, value in (("seconds", seconds), ("cpu_seconds", result.cpu_seconds)):
            part[name][str(seed)] = part[name].get(str(seed), 0.0) + value
        if result.outcome in BARS:
            shown = asdict(replace(result, detail=without_paths(result.detail)[:300]))
            part["failures"].append({"seed": seed, **shown})
    return parts


def time_bar(bench: TrialBench, parts: Mapping[str, Any]) -> list[Bar]:
    """Return the bar for the slowest seed with which all families ran."""
    seeds = [set(part.get("seconds", ())) for part in parts.values()]
    shared = set.intersection(*seeds)
    if bench.minutes is None or set(parts) != set(bench.families) or not shared:
        return []
    processes = max(part["processes"] for part in parts.values())
    took = max(sum(part["seconds"][seed] for part in parts.values()) for seed in shared)
    name = f"minutes for all trials of one seed, in {processes} processes"
    return [Bar(name, took / 60, "<=", bench.minutes)]


def _others(bench: TrialBench, families: Sequence[str]) -> dict[str, Any]:
    """Return the saved results of other families."""
    parts = earlier(bench.name).get("figures", {}).get("families", {})
    return {name: part for name, part in parts.items() if name not in families}
