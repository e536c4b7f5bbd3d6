"""The time that a run still takes: what each stage is expected to take, corrected by the pace of
those that are finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.runfolder import Stage

Expected = Mapping[str, float]
"""Seconds of each stage of a run, in its order; empty if they are not known."""

ENOUGH = 20.0
"""Expected seconds of finished stages from which on their pace counts: small ones tell little."""
SLOWEST, FASTEST = 10.0, 0.1
"""Limits of the pace: one measured stage may not be like the others."""


@dataclass(frozen=True)
class TimeLeft:
    """expect: from the finished stages, the seconds of all. finished: grows as the run goes on."""

    expect: Callable[[Sequence[Stage]], Expected]
    finished: Sequence[Stage]

    def seconds(self, stage: str) -> float | None:
        """Expected from the start of a stage to the end of the run; None: not known."""
        expected = self.expect(self.finished)
        if stage not in expected:
            return None
        names = list(expected)
        return self._pace(expected) * sum(expected[name] for name in names[names.index(stage) :])

    def text(self, stage: str) -> str:
        """For the line that announces a stage; empty if the time is not known."""
        seconds = self.seconds(stage)
        if seconds is None:
            return ""
        minutes = round(seconds / 60)
        shown = "less than a minute" if minutes < 1 else f"about {minutes:,} min"
        return f" ({shown} left)"

    def _pace(self, expected: Expected) -> float:
        """Seconds taken for each expected one."""
        known = [one for one in self.finished if not one.reused and one.name in expected]
        planned = sum(expected[one.name] for one in known)
        if planned < ENOUGH:
            return 1.0
        pace = sum(one.cost.seconds for one in known) / planned
        return min(SLOWEST, max(FASTEST, pace))
