"""Trials that stop a tiny run with SIGTERM or SIGINT and resume it with the same command.

Right: the process ends within five seconds, with its signal's status and one message; then as for a
killed run. Requests in flight are paid for, so the time starts when they are answered. The
time in which the process was ready to run while other processes occupied all cores is subtracted
(see `core_waits`); it is zero on an idle machine.
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

from bench.input_trials.trial import Trial
from bench.knock_trials.aftermath import one_message
from bench.knock_trials.core_waits import CoreWaits
from bench.knock_trials.disturbed_run import DisturbedRun
from bench.knock_trials.kill_trials import FORKED, FRESH, in_order, moment
from bench.knock_trials.moments import IMPORTS, Moment
from bench.knock_trials.tiny_runs import KINDS, REQUESTS, Kind, Process

WITHIN = 5.0
"""Seconds, excluding the time that the process waited for a core."""
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
ANSWERED_AFTER = 1.0
"""Seconds until the server answers, in trials that stop a run at a request."""


def kind_of(number: int) -> Kind:
    """Choose the kind: of 20 trials, two replay in separate processes, one uses torchrun, and two
    are stopped while Python starts."""
    name = {6: FRESH[0], 11: FRESH[1], 16: FRESH[0]}.get(number % 20)
    kind = KINDS[name or FORKED[(number + number // 6) % len(FORKED)]]
    return replace(kind, fresh=True) if number % 20 in (3, 13) else kind


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    kind = kind_of(number)
    chosen = [moment(chance, kind) for _ in range(chance.randint(1, 2))]
    chosen = [
        replace(each, signal=chance.choice(list(STATUS)), noted=str(folder / f"sent-{place}"))
        for place, each in enumerate(in_order(chosen, kind))
    ]
    if kind.fresh and kind.name in FORKED:
        early = Moment(IMPORTS, 0, chance.uniform(0.0, 4.0), signal=chosen[0].signal)
        chosen = [replace(early, noted=chosen[0].noted)]
    slow = ANSWERED_AFTER if any(each.part == REQUESTS for each in chosen) else 0.0
    title = f"{kind.name}: " + ", ".join(map(str, chosen))
    variable = chance.choice(["TMPDIR", "TEMP"])
    run = DisturbedRun(kind, kind, chosen, folder, variable, wrong_end, slow)
    return Trial(title, run.problem, lambda found: found)


def wrong_end(
    kind: Kind, process: Process, status: int, moment: Moment, waits: CoreWaits
) -> str | None:
    sent = float(Path(moment.noted).read_text())
    took, without_core = time.monotonic() - sent, waits.since(sent)
    grace = ANSWERED_AFTER if moment.part == REQUESTS else 0.0
    if took - without_core > WITHIN + grace:
        return f"it took {took:.1f} s, including {without_core:.1f} s without a core"
    said = process.errors()
    if kind.processes > 1:
        said = said.split("torch/distributed/run.py")[0]
        return said[-900:] if "this is a bug" in said else None
    if status == -moment.signal and (not said.strip() or "\nreport: " in said):
        return None  # before the handler is installed, or after the run is done
    if moment.victim == "its children":
        return one_message(said)
    if status != STATUS[signal.Signals(moment.signal)]:
        return f"status {status}: {said[-900:]}"
    return one_message(said, ("stopped.",))
