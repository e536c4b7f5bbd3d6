"""Time limits of trials on a machine that also does other work."""

from __future__ import annotations

import os


def on_busy_cores(seconds: float) -> float:
    """Scale `seconds`, measured with one core per process, to the current load."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
