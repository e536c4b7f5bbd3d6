"""The limits of memory and processor time around this process: cgroups(7), versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_left() -> Iterator[int]:
    """What the memory limits around this process leave: of a container, a Slurm job, a service.

    Pages of files count as free, as the kernel frees them.
    """
    for version, folder in _cgroups("memory"):
        limit, used, prefix = "memory.max", "memory.current", ""
        if version == 1:
            limit, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        # No file, of the root or outside of a container; "max", which is no limit.
        with suppress(OSError, ValueError, LookupError):
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            rows = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            pages = {name: int(size) for name, size in map(str.split, rows)}
            files = pages[f"{prefix}active_file"] + pages[f"{prefix}inactive_file"]
            yield most - taken + files


def cores() -> Iterator[int]:
    """The whole cores whose time the limits around this process allow, at least one: of a container
    with `--cpus`, for example."""
    for version, folder in _cgroups("cpu"):
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        with suppress(OSError, ValueError):  # as above
            quota, period = map(int, " ".join((folder / n).read_text() for n in names).split())
            if quota > 0:  # -1 is no limit
                yield max(1, quota // period)


def _cgroups(controller: str) -> Iterator[tuple[Literal[1, 2], Path]]:
    """The version and the folder of each cgroup (cgroups(7)) that this process is in, the innermost
    first."""
    if not OWN_CGROUPS.is_file():
        return
    for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        own = (CGROUPS / controller if controllers else CGROUPS) / path.lstrip("/")
        for folder in (own, *own.parents):
            yield (1 if controllers else 2), folder
