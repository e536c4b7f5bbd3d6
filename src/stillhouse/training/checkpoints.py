"""Trainer checkpoints that are complete or absent, and the metrics that belong to them.

transformers writes a checkpoint file by file under its final name. A kill in the middle leaves one
that looks right, so a checkpoint counts only once `complete.json` is in it, written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stillhouse.progress import note
from stillhouse.runfolder import flush_tree, write_atomically

COMPLETE = "complete.json"


@dataclass(frozen=True)
class Meter:
    """What training had done at a checkpoint: steps, supervised tokens, and seconds of work."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path, meter: Meter) -> None:
    """Flush the checkpoint to disk and mark it complete. All processes must have written it."""
    flush_tree(checkpoint)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_atomically(checkpoint / COMPLETE, json.dumps({"meter": asdict(meter), "bytes": sizes}))
    flush_tree(checkpoint)


def latest(folder: Path) -> tuple[Path, Meter] | None:
    """The newest complete checkpoint. Half-written ones are left for `drop_incomplete`."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        meter = _meter(checkpoint)
        if meter is not None:
            return checkpoint, meter
    return None


def drop_incomplete(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if _meter(checkpoint) is None:
            note(f"{checkpoint.name} was cut off while it was written: ignored")
            shutil.rmtree(checkpoint)


def set_aside(checkpoint: Path, why: str) -> None:
    """Renames a checkpoint that cannot be loaded, so that it is neither used nor overwritten."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    before = latest(checkpoint.parent)
    instead = "training starts anew" if before is None else f"going back to {before[0].name}"
    note(f"{checkpoint.name} cannot be loaded ({why}), and is now {aside.name}: {instead}")


def keep_newest(folder: Path, count: int) -> None:
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of)[:-count]:
        shutil.rmtree(checkpoint)


def _meter(checkpoint: Path) -> Meter | None:
    try:
        raw = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        whole = all((checkpoint / f).stat().st_size == size for f, size in raw["bytes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return Meter(**raw["meter"]) if whole else None


class Metrics:
    """The rows that training logs, each with its optimizer step; in metrics.jsonl, one a line."""

    def __init__(self, path: Path | None = None, *, keep_to_step: int = 0) -> None:
        """path: None keeps them in memory alone. keep_to_step: rows of the file up to that step
        stay; what a killed process wrote after it is done again."""
        self.path = path
        self.rows: list[dict[str, float]] = []
        if path is not None:
            self.rows = [row for row in read_metrics(path) if row["step"] <= keep_to_step]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    rows: list[dict[str, float]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
