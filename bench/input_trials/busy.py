"""How long a trial may take on a machine that does other work, too."""

from __future__ import annotations

import os


def on_busy_cores(seconds: float) -> float:
    """The time of work that takes `seconds` with a core for each process that wants one."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
