"""The output of every benchmark: machine, versions, raw figures, and bars."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.hardware import machine
from stillhouse.stage_manifest import versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Bar:
    """A target and the measured value, recorded whether or not the target is met."""

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
    """Write bench/results/NAME.json and print the bars."""
    RESULTS.mkdir(exist_ok=True)
    result = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", _module() or f"bench.{name}", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "seeds": list(seeds),
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        "figures": figures,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(without_paths(result), indent=2) + "\n", encoding="utf-8")
    for bar in bars:
        print(f"{'met ' if bar.met else 'MISS'} {bar.name}: {bar.value:.4g} {bar.op} {bar.bar}")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _module() -> str | None:
    """Return the name of the module that was started with `python -m`."""
    return getattr(sys.modules["__main__"].__spec__, "name", None)


def make_piece(folder: Path, last: str, work: Callable[[], object]) -> bool:
    """Run one piece of an experiment in its folder, unless the last file that `work` writes exists.
    Return whether the work was done."""
    if (folder / last).exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    print(f"--- {'/'.join(folder.parts[-2:])}", flush=True)
    work()
    return True


_FOLDERS = re.compile(r"""(?<![^\s"'`=(\[:,])(?:file://)?/(?:[^\s/"'`:]+/)+""")
"""Matches all but the last component of an absolute path."""


def without_paths(value: Any) -> Any:
    """Return the JSON value with absolute paths shortened to their last component: results are
    committed, and a machine's folders are private."""
    if isinstance(value, dict):
        return {_FOLDERS.sub("", str(key)): without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def earlier(name: str) -> dict[str, Any]:
    """Return the results of a benchmark's last run, or {} if there are none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def commit() -> str:
    """Return the current commit, or `unknown` outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
