"""Limits on this process's memory and CPU time: cgroups(7), versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_left() -> Iterator[int]:
    """Yield the bytes that each memory limit around this process (of a container, a Slurm job, or
    a service) leaves.

    File pages count as free, because the kernel frees them on demand.
    """
    for version, folder in _cgroups("memory"):
        limit, used, prefix = "memory.max", "memory.current", ""
        if version == 1:
            limit, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        # The root cgroup and systems without containers have no such file; "max" is no limit.
        with suppress(OSError, ValueError, LookupError):
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            rows = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            pages = {name: int(size) for name, size in map(str.split, rows)}
            files = pages[f"{prefix}active_file"] + pages[f"{prefix}inactive_file"]
            yield most - taken + files


def cores() -> Iterator[int]:
    """Yield the whole cores, at least one, that each CPU limit around this process allows: that of
    a container started with `--cpus`, for example."""
    for version, folder in _cgroups("cpu"):
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        with suppress(OSError, ValueError):  # as above
            quota, period = map(int, " ".join((folder / n).read_text() for n in names).split())
            if quota > 0:  # -1 is no limit
                yield max(1, quota // period)


def _cgroups(controller: str) -> Iterator[tuple[Literal[1, 2], Path]]:
    """Yield the version and folder of each cgroup that this process is in, innermost first."""
    if not OWN_CGROUPS.is_file():
        return
    for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        own = (CGROUPS / controller if controllers else CGROUPS) / path.lstrip("/")
        for folder in (own, *own.parents):
            yield (1 if controllers else 2), folder
