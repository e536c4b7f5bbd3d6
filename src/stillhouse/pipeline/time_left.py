"""Estimates a run's remaining time: each stage's expected time, corrected by the pace of the
finished stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.runfolder import Stage

Expected = Mapping[str, float]
"""Expected seconds of a run's stages, in order; empty if they are not known."""

ENOUGH = 20.0
"""Expected seconds of finished stages from which their pace counts: short stages say little."""
SLOWEST, FASTEST = 10.0, 0.1
"""Limits on the pace, because one measured stage may not be typical of the others."""


@dataclass(frozen=True)
class TimeLeft:
    """The remaining time of a run.

    expect: returns the expected seconds of all stages, given the finished ones. finished: grows
    during the run.
    """

    expect: Callable[[Sequence[Stage]], Expected]
    finished: Sequence[Stage]

    def seconds(self, stage: str) -> float | None:
        """Expected seconds from the start of a stage to the end of the run; None if unknown."""
        expected = self.expect(self.finished)
        if stage not in expected:
            return None
        names = list(expected)
        return self._pace(expected) * sum(expected[name] for name in names[names.index(stage) :])

    def text(self, stage: str) -> str:
        """Text for the line that announces a stage; empty if the time is unknown."""
        seconds = self.seconds(stage)
        if seconds is None:
            return ""
        minutes = round(seconds / 60)
        shown = "less than a minute" if minutes < 1 else f"about {minutes:,} min"
        return f" ({shown} left)"

    def _pace(self, expected: Expected) -> float:
        """Actual seconds per expected second."""
        known = [one for one in self.finished if not one.reused and one.name in expected]
        planned = sum(expected[one.name] for one in known)
        if planned < ENOUGH:
            return 1.0
        pace = sum(one.cost.seconds for one in known) / planned
        return min(SLOWEST, max(FASTEST, pace))
