"""Tests damaged files, faulty servers, and runs that are killed, stopped or started twice.

    make bench NAME=knocks
    python -m bench.knocks --seed 1 --family damage --count 100
    python -m bench.knocks --seed 1 --family damage --add

Every trial has a seed, and an oracle: an undisturbed run, or what was written before the damage.
Every failure is listed with the numbers that reproduce it:

    python -m bench.knocks --seed 1 --only damage:17

What is killed, stopped, started twice, or runs out of disk is a process of its own, with real
signals and real files, and so is what goes on after it. In nine of ten trials these processes are
forked from one that has imported torch, transformers and matplotlib, for which a new one needs five
seconds of processor time, and exports are replayed in the process that exports. In the others they
are started as `python -m`: all that replay exports in a fresh process, all under torchrun (with
`torchrun` itself), two of twenty that are stopped while Python starts, and the last process of 3%
of the killed runs. An undisturbed run is done once for each kind of run in each worker, for all
families. Damaged files and faulty servers are read in the worker itself.

The processor time of each family is recorded beside the time it took: on a machine that does other
work, half of the processor time is what two cores need without it.
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
    "right": "the fault is noticed and the result is that of an undisturbed run, or it is harmless",
    "refused": "one error with a place and a way out",
    "noted": "not used here",
    "silent": "another result, a second purchase, a budget exceeded, a key written or a leftover",
    "wrongly refused": "an error although nothing was wrong",
    "unclear": "an error without a place or without a way out",
    "traceback": "an exception that is no StillhouseError",
    "hang": "not finished in time",
}


def main() -> None:
    run_command(TrialBench("knocks", FAMILIES, COUNTS, MEANING, minutes=40.0), __doc__)


if __name__ == "__main__":
    main()
