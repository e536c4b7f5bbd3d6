"""What every benchmark writes: the machine, the versions, the raw figures, and the bars."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.hardware import machine
from stillhouse.runfolder import versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Bar:
    """A number that was asked for, and the one that was measured. Met or not, it stays."""

    name: str
    value: float
    op: Literal["<=", ">="]
    bar: float

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.op == "<=" else self.value >= self.bar


def write_results(
    name: str, figures: Any, bars: Sequence[Bar], seeds: Sequence[int] = (0,)
) -> None:
    """Writes bench/results/NAME.json and prints the bars."""
    RESULTS.mkdir(exist_ok=True)
    result = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", f"bench.{name}", *map(_nameless, sys.argv[1:])]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "seeds": list(seeds),
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        "figures": figures,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for bar in bars:
        print(f"{'met ' if bar.met else 'MISS'} {bar.name}: {bar.value:.4g} {bar.op} {bar.bar}")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _nameless(argument: str) -> str:
    """A path by its last name: results are committed, and folders are nobody's business."""
    return Path(argument).name if "/" in argument else argument


def earlier(name: str) -> dict[str, Any]:
    """What the last run of a benchmark wrote; {} before there was any."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def commit() -> str:
    """The commit that is measured; `unknown` outside of a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
