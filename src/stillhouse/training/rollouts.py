"""Answers that a student generated during training, in folders that are complete or absent.

Answers are kept as token ids, since decoded text could be tokenized differently.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stillhouse.atomic_files import flush, flush_tree
from stillhouse.checksums import damaged_files, fast_facts, seal_broken, sealed
from stillhouse.data.batches import Batch, collate
from stillhouse.data.packing import Segment, fill_windows
from stillhouse.disk_errors import disk_errors

ROLLOUTS = "rollouts"
"""The folder of rollouts in a training run's folder, with a folder `step-N` for each window."""
_ROWS, _TOKENS, _STEP = "rollouts.json", "tokens.npy", "step-"


@dataclass(frozen=True)
class Rollout:
    """An answer to a prompt.

    slot: its index among all rollouts of the training run. ids: the prompt, the tokens that the
    teacher generated, and those that the student generated, including the end token. prompt: number
    of tokens in the prompt. given: number of tokens before the student's own. stop: `stop` (an end
    token was generated) or `length`.
    """

    slot: int
    ids: tuple[int, ...]
    prompt: int
    given: int
    stop: str

    @property
    def own(self) -> tuple[int, ...]:
        """The tokens that the student generated."""
        return self.ids[self.given :]

    @property
    def cut_off(self) -> bool:
        return self.stop != "stop"


def window_folder(folder: Path, step: int) -> Path:
    """The folder of the rollouts that were generated before optimizer step `step` (from 0).

    folder: the training run's.
    """
    return folder / ROLLOUTS / f"{_STEP}{step:08}"


def save_rollouts(folder: Path, rollouts: Sequence[Rollout], identity: str) -> None:
    """Write the rollouts durably, to a folder that is either complete or absent.

    identity: of the settings and prompts that they were generated from. Raises RunError if the
    folder cannot be written (for example, if the disk is full).
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        tokens = [token for rollout in rollouts for token in rollout.ids]
        np.save(partial / _TOKENS, np.array(tokens, dtype=np.int32))
        rows = [[r.slot, len(r.ids), r.prompt, r.given, r.stop] for r in rollouts]
        files = {_TOKENS: fast_facts(partial / _TOKENS)}
        facts = sealed({"identity": identity, "rows": rows, "files": files})
        (partial / _ROWS).write_text(json.dumps(facts), encoding="utf-8")
        flush_tree(partial)
        partial.rename(folder)
        flush(folder.parent)


def read_rollouts(folder: Path, identity: str | None = None) -> list[Rollout] | None:
    """Read the rollouts that `save_rollouts` wrote; None if they are missing, damaged, or have a
    different identity."""
    try:
        facts = json.loads((folder / _ROWS).read_text(encoding="utf-8"))
        if seal_broken(facts) or damaged_files(folder, facts["files"]):
            return None
        tokens = np.load(folder / _TOKENS).tolist()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if identity not in (None, facts["identity"]):
        return None
    rollouts, end = [], 0
    for slot, length, prompt, given, stop in facts["rows"]:
        ids = tuple(tokens[end : end + length])
        rollouts.append(Rollout(slot, ids, prompt, given, stop))
        end += length
    return rollouts


def forget_rollouts(folder: Path, before: int) -> None:
    """Delete the rollouts of windows that began before a step. folder: the training run's."""
    for path in rollouts_in(folder):
        if int(path.name.removeprefix(_STEP)) < before:
            shutil.rmtree(path)


def rollouts_in(folder: Path) -> list[Path]:
    """The windows' folders in a training run's folder, in order."""
    found = (folder / ROLLOUTS).glob(f"{_STEP}*")
    return sorted(path for path in found if path.name.removeprefix(_STEP).isdecimal())


class OwnBatch(dict[str, torch.Tensor]):
    """A batch of text that the student generated."""


def rollout_batch(
    windows: Sequence[Sequence[Rollout]], width: int, pad_id: int, *, drop_cut_off: bool = False
) -> OwnBatch:
    """Pack rollouts into windows [R, L], in which only the student's own tokens are supervised.

    width: L, at least the number of tokens of each window. Without windows, the batch is one row
    without supervised tokens. drop_cut_off: do not supervise truncated answers.
    """
    rollouts, row = [rollout for window in windows for rollout in window], itertools.count()
    plan = [[Segment(next(row), 0, len(one.ids)) for one in window] for window in windows or [()]]

    def read(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        rollout = rollouts[segment.row]
        own = np.arange(segment.length) >= rollout.given
        own &= not (drop_cut_off and rollout.cut_off)
        return np.array(rollout.ids, dtype=np.int32), own

    rows: list[Batch] = [
        {name: torch.from_numpy(array_L.astype(np.int64)) for name, array_L in one.items()}
        for one in fill_windows(plan, read, width, pad_id)
    ]
    return OwnBatch(collate(rows))
