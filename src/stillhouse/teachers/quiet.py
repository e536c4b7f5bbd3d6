"""Silencing of libraries' progress bars and notices."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and transformers' progress bars and notices inside the block."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    _set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _set_verbosity(level: int) -> None:
    # Setting a level, even to the same value, clears the caches of all loggers of the process.
    if hf_logging.get_verbosity() != level:
        hf_logging.set_verbosity(level)
