"""Checks the text that is passed to a function of the Python API."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stillhouse.data.batches import Batches
from stillhouse.data.data import Data
from stillhouse.data.windows import ARRAYS
from stillhouse.errors import DataError


def given_windows(data: Data | Batches, *, heldout: bool = False) -> Batches:
    """Return the training or held-out windows of `data`. Raises DataError if it is not data."""
    if isinstance(data, Data):
        return data.heldout if heldout else data.train
    if not hasattr(data, "supervised_tokens"):
        try:
            first = data[0]
        except (TypeError, LookupError):
            first = None
        if not isinstance(first, Mapping) or "input_ids" not in first:
            raise DataError(
                f"the data is a {type(data).__name__}, not windows of tokens",
                fix="build them first: Data.build(...)",
            )
        lacking = [name for name in ARRAYS if not isinstance(first.get(name), torch.Tensor)]
        if lacking:
            raise DataError(
                f"the windows have no tensors named {', '.join(lacking)}",
                fix="build them with Data.build(...)",
            )
    return data


def training_text(data: Data | Batches) -> Batches:
    """Like `given_windows`, for training, which must know the windows' size."""
    text = given_windows(data)
    if not (hasattr(text, "supervised_tokens") and hasattr(text, "context")):
        raise DataError(
            f"the data is a {type(text).__name__} of windows, without the attributes context and "
            "supervised_tokens, which training needs",
            fix="build the data with Data.build(...)",
        )
    return text
