"""Trials that kill a tiny run one to four times and resume it with the same command.

Right: the tensors of an undisturbed run, no received answer is bought again, nothing is left over.
"""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path

from bench.input_trials.trial import Trial
from bench.knock_trials.aftermath import one_message
from bench.knock_trials.core_waits import CoreWaits
from bench.knock_trials.disturbed_run import DisturbedRun
from bench.knock_trials.moments import OWN_PROCESS, TIME, Moment, Victim
from bench.knock_trials.tiny_runs import KINDS, Kind, Process, undisturbed

FORKED = [name for name, kind in KINDS.items() if not kind.fresh]
FRESH = [name for name, kind in KINDS.items() if kind.fresh]
BY_TIME, LATER = 0.25, 0.4
"""Shares of moments that are given by time, and that come some milliseconds after a write."""
REAL = 0.03
"""Share of trials whose last process is not forked."""


def kind_of(number: int) -> Kind:
    """Choose the kind: of 50 trials, three replay in a separate process and two use torchrun."""
    name = {7: FRESH[0], 15: FRESH[1], 23: FRESH[0], 31: FRESH[0], 47: FRESH[1]}.get(number % 50)
    return KINDS[name or FORKED[(number - number // 8) % len(FORKED)]]


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    kind = kind_of(number)
    count = chance.randint(1, 2 if kind.fresh else 4)
    moments = in_order([moment(chance, kind) for _ in range(count)], kind)
    environment = chance.choice(["TMPDIR", "TEMP"])
    last = replace(kind, fresh=True) if chance.random() < REAL else kind
    title = f"{kind.name}: " + ", ".join(map(str, moments))
    run = DisturbedRun(kind, last, moments, folder, environment, wrong_end)
    return Trial(title, run.problem, lambda found: found)


def moment(chance: random.Random, kind: Kind) -> Moment:
    """Draw a moment. All parts of the run are equally likely."""
    known = undisturbed(kind.name)
    victims: list[Victim] = ["it", "its group"] if kind.processes == 1 else ["it", "its sibling"]
    if chance.random() < BY_TIME:
        moment = Moment(TIME, 0, chance.uniform(0.0, 0.95) * known.seconds)
    else:
        part = chance.choice(list(known.writes))
        if OWN_PROCESS in known.writes and kind.processes == 1 and chance.random() < 0.5:
            part = OWN_PROCESS
        delay = chance.uniform(0.002, 0.03) if chance.random() < LATER else 0.0
        moment = Moment(part, chance.randint(1, known.writes[part]), delay)
        if part == OWN_PROCESS:
            victims.append("its children")
            moment = replace(moment, delay=chance.uniform(0.1, 4.0))
    if kind.processes > 1:
        victims += ["its family", "its parent"]
    return replace(moment, victim=chance.choice(victims))


def in_order(moments: list[Moment], kind: Kind) -> list[Moment]:
    """Sort moments by part of the run, so that each can be reached after the previous one."""
    parts = [*undisturbed(kind.name).writes, TIME]
    return sorted(moments, key=lambda moment: parts.index(moment.part))


def wrong_end(
    kind: Kind, process: Process, status: int, moment: Moment, waits: CoreWaits
) -> str | None:
    """Check the messages of processes that were not killed themselves."""
    if status == -signal.SIGKILL:
        return None
    said = process.errors()
    if kind.processes == 1:
        return f"status {status}" if status != 1 else one_message(said)
    # Each torchrun process can print one message; torchrun itself ends with a traceback.
    said = said.split("torch/distributed/run.py")[0]
    return said[-900:] if "this is a bug" in said else None
