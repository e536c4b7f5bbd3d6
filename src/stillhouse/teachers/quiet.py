"""Silences the progress bars and notices of libraries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, show no tqdm bars, warnings or notices of transformers."""
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
    """Setting a level, even the same, makes all loggers of the process forget what they cached."""
    if hf_logging.get_verbosity() != level:
        hf_logging.set_verbosity(level)
