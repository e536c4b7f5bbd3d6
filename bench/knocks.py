"""Fault injection: damaged files, faulty servers, and killed, stopped, or concurrent runs.

    make bench NAME=knocks
    python -m bench.knocks --seed 1 --family damage --count 100
    python -m bench.knocks --seed 1 --family damage --add

Every trial has a seed and an oracle: an undisturbed run, or the data before the damage. Every
failure is listed with the numbers that reproduce it:

    python -m bench.knocks --seed 1 --only damage:17

Runs that are killed, stopped, started twice, or run out of disk are separate processes with real
signals and real files, and so are the processes that resume them. In nine of ten trials, they are
forked from a process that has already imported torch, transformers, and matplotlib, which saves
five seconds of processor time, and exports are replayed in the same process. The others are started
as `python -m`: all runs that replay exports in a new process, all runs under torchrun (with
`torchrun` itself), two of twenty runs that are stopped while Python starts, and the last process of
3% of the killed runs. Each worker does one undisturbed run per kind of run, which all families
share. Damaged files and faulty servers are tested in the worker itself.

The processor time of each family is recorded next to its wall-clock time: on a busy machine, half
of the processor time is what two idle cores would need.
"""

from __future__ import annotations

from bench.input_trials.workers import Family
from bench.trial_command import TrialBench, run_command

FAMILIES = {
    family.name: family
    for family in (
        Family("damage", "bench.knock_trials.damage_trials", 60.0),
        Family("server", "bench.knock_trials.server_trials", 20.0),
        Family("kill", "bench.knock_trials.kill_trials", 120.0),
        Family("stop", "bench.knock_trials.stop_trials", 120.0),
        Family("pair", "bench.knock_trials.pair_trials", 120.0),
        Family("disk", "bench.knock_trials.disk_trials", 120.0),
    )
}
COUNTS = {"damage": 3000, "server": 150, "kill": 300, "stop": 60, "pair": 30, "disk": 60}
MEANING = {
    "right": "the fault is harmless, or detected with the result of an undisturbed run",
    "refused": "one error with a place and a fix",
    "noted": "not used here",
    "silent": "a different result, a second purchase, an exceeded budget, a leaked key, a leftover",
    "wrongly refused": "an error, although nothing was wrong",
    "unclear": "an error without a place or a fix",
    "traceback": "an exception other than StillhouseError",
    "hang": "not finished in time",
}


def main() -> None:
    run_command(TrialBench("knocks", FAMILIES, COUNTS, MEANING, minutes=40.0), __doc__)


if __name__ == "__main__":
    main()
