"""Reports the end of another process under torchrun as one error, instead of a backend's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from stillhouse.errors import TrainingError

_LOST = re.compile("gloo|Connection (reset|closed) by peer|ProcessGroup|NCCL", re.IGNORECASE)
"""In errors of gloo, which are plain RuntimeErrors."""


@contextmanager
def lost_process(processes: int) -> Iterator[None]:
    """Raise TrainingError if another process has ended and this one cannot continue."""
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not (isinstance(error, DistError) or _LOST.search(str(error))):
            raise
        raise TrainingError(
            f"another of the {processes} processes has ended, or cannot be reached",
            where=str(error).splitlines()[0],
            fix="its own message says why (none: it was killed, for lack of memory perhaps); give "
            "the same command again: it goes on from the last checkpoint",
        ) from error
