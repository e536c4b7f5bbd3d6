"""Runs that are killed and resume with other processes or sharding end as if undisturbed.

`make test-processes` runs them.
"""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from stillhouse.launch import process_index
from stillhouse.verify_folder import verify_folder
from tests import forks
from tests.processes.process_runs import (
    before_writing,
    differences,
    errors_at_exit,
    one_thread,
    orders_apart,
    recipe,
    too_far,
)

pytestmark = pytest.mark.processes


@dataclass(frozen=True)
class Start:
    """How a run is started or resumed.

    shard: train.shard. micro: windows per micro-batch; None: the default. checkpointing: gradient
    checkpointing.
    """

    processes: int
    shard: str
    nodes: int = 1
    micro: int | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Kill:
    """A start in which one process, `victim`, gets a signal before it first writes to a path that
    contains `point`.

    number: the signal. after: ignore `point` until a path that contains this is written. broken: a
    file of the unfinished stage, which then loses its second half.
    """

    start: Start
    point: str
    victim: int = 0
    number: int = signal.SIGKILL
    after: str = ""
    broken: str = ""


ONE = Start(1, "none")
TWO = {shard: Start(2, shard) for shard in ("none", "student", "teacher", "both")}
FOUR = {shard: Start(4, shard) for shard in ("none", "student", "teacher", "both")}
NODES = {shard: Start(4, shard, nodes=2) for shard in ("student", "both")}

WINDOWS = r"data-.*/train/windows\.json"
PRUNED = r"student-.*/model/config\.json"
SHARD_OF_STORE = r"signals-.*/shards/[^.]*\.bin"
STORE = r"signals-.*/store/manifest\.json"
RENAMED = r"stages/train-[0-9a-f]*$"
MODEL = r"train-.*/unfinished-model/config\.json"
EVALUATION = r"evaluation\.json"
CARD = r"export-.*/README\.md"
FIRST_MEMBER = r"run/wide"


def checkpoint(step: int, file: str, stage: str = "train") -> str:
    return rf"{stage}-.*/checkpoint-{step}/{file}"


def part(step: int, process: int, stage: str = "train") -> str:
    """A process's part of a checkpoint of a sharded student."""
    return checkpoint(step, rf"sharded/__{process}_0\.distcp", stage)


STATE, SEAL, INDEX = r"trainer_state\.json", r"complete\.json", r"sharded/\.metadata"
TRIALS: dict[str, tuple[str, list[Kill], Start]] = {
    "data and shards of a store": (
        "stored",
        [
            Kill(FOUR["both"], WINDOWS),
            Kill(TWO["both"], SHARD_OF_STORE, victim=1),
            Kill(NODES["student"], SHARD_OF_STORE, victim=2),
        ],
        ONE,
    ),
    "a store without its manifest": (
        "stored",
        [Kill(TWO["student"], STORE), Kill(ONE, STORE), Kill(TWO["none"], EVALUATION)],
        FOUR["both"],
    ),
    "a pruned student": ("live", [Kill(FOUR["teacher"], PRUNED)], TWO["teacher"]),
    "parts of a sharded checkpoint": (
        "live",
        [Kill(TWO["both"], part(4, 1), victim=1), Kill(FOUR["both"], part(4, 3), victim=3)],
        ONE,
    ),
    "parts of two nodes": (
        "live",
        [
            Kill(NODES["both"], part(2, 1), victim=1),
            Kill(NODES["student"], part(4, 0)),
            Kill(FOUR["teacher"], checkpoint(6, SEAL)),
        ],
        TWO["both"],
    ),
    "a checkpoint without its index": (
        "live",
        [Kill(FOUR["student"], checkpoint(4, INDEX)), Kill(TWO["student"], checkpoint(6, SEAL))],
        NODES["both"],
    ),
    "from one process to several": (
        "live",
        [Kill(ONE, checkpoint(4, SEAL)), Kill(TWO["both"], MODEL)],
        FOUR["student"],
    ),
    "from several processes to one": (
        "live",
        [Kill(TWO["none"], checkpoint(4, STATE)), Kill(TWO["both"], part(6, 0))],
        ONE,
    ),
    "with other micro-batches and checkpointing": (
        "live",
        [
            Kill(Start(1, "none", micro=4), checkpoint(4, STATE)),
            Kill(Start(2, "both", micro=1, checkpointing=True), part(6, 1), victim=1),
        ],
        Start(1, "none", micro=2, checkpointing=True),
    ),
    "a checkpoint that lost a part": (
        "live",
        [
            Kill(
                TWO["both"],
                checkpoint(6, SEAL),
                broken="checkpoints/checkpoint-4/sharded/__1_0.distcp",
            )
        ],
        TWO["both"],
    ),
    "a stage before it is renamed": (
        "hidden",
        [Kill(TWO["both"], RENAMED), Kill(TWO["both"], CARD)],
        ONE,
    ),
    "terms on hidden states": (
        "hidden",
        [Kill(TWO["both"], checkpoint(2, SEAL)), Kill(FOUR["student"], part(6, 2), victim=2)],
        NODES["both"],
    ),
    "the first member of a family": (
        "cascade",
        [Kill(TWO["teacher"], checkpoint(4, STATE)), Kill(TWO["both"], EVALUATION)],
        ONE,
    ),
    "the second member of a family": (
        "cascade",
        [
            Kill(NODES["student"], part(4, 0), after=FIRST_MEMBER),
            Kill(TWO["both"], EVALUATION, after=FIRST_MEMBER),
        ],
        TWO["both"],
    ),
    "quantization-aware training": (
        "qat",
        [Kill(TWO["both"], part(2, 1, "qat"), victim=1), Kill(FOUR["none"], CARD)],
        ONE,
    ),
    "quantized weights": (
        "qat",
        [Kill(ONE, r"quantize-.*/manifest\.json"), Kill(TWO["teacher"], r"qat-.*/manifest\.json")],
        NODES["student"],
    ),
    "stopped by signals": (
        "live",
        [
            Kill(TWO["both"], checkpoint(4, SEAL), number=signal.SIGTERM),
            Kill(FOUR["none"], CARD, number=signal.SIGINT),
        ],
        TWO["student"],
    ),
}


def work(path: Path, start: Start, kill: Kill | None) -> None:
    one_thread()
    if kill is not None and process_index() == kill.victim:
        send = partial(os.kill, os.getpid(), kill.number)
        armed = partial(before_writing, kill.point, send)
        if kill.after:
            before_writing(kill.after, armed)
        else:
            armed()
    within = "node" if start.nodes > 1 else "all"
    options = [f"train.shard={start.shard}", f"train.shard_within={within}"]
    if start.micro is not None:
        options.append(f"train.micro_batch_size={start.micro}")
    if start.checkpointing:
        options.append("train.gradient_checkpointing=true")
    forks._stillhouse("run", str(path), *[each for one in options for each in ("--set", one)])


def run(path: Path, start: Start, kill: Kill | None = None) -> list[int | None]:
    """The exit status of each process. Checks that none reports more than one error."""
    processes = forks.ranks(start.processes, work, path, start, kill, nodes=start.nodes)
    for said in errors_at_exit(processes):
        assert "Traceback" not in said, said[-3000:]
        assert said.count("error: ") <= 1, said[-3000:]
    return [process.poll() for process in processes]


@pytest.mark.parametrize("name", TRIALS)
def test_a_killed_run_ends_like_an_undisturbed_one(
    inputs: Path, alone: Path, tmp_path: Path, name: str
) -> None:
    kind, kills, last = TRIALS[name]
    root, path = tmp_path / "run", tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(inputs, root, kind)))
    for kill in kills:
        status = run(path, kill.start, kill)[kill.victim]
        killed = -signal.SIGKILL if kill.number == signal.SIGKILL else 128 + kill.number
        assert status == killed, f"{kill}: the point was not reached"
        if kill.broken:
            (file,) = root.glob(f"stages/.*/{kill.broken}")
            os.truncate(file, file.stat().st_size // 2)
    assert run(path, last) == [0] * last.processes
    found = differences(root, alone / f"{kind} 1")
    assert not too_far(found, orders_apart(alone, kind)), (found, orders_apart(alone, kind))
    assert not list(root.glob("stages/.*"))
    assert not list(root.glob(".scratch*"))
    assert [problem for each in verify_folder(root) for problem in each.problems] == []
    shutil.rmtree(root)
