"""Encoded rows in memory: the output of encoders, content of shards, and input of decoders.

Shapes: N rows, E entries of all rows, X stored values of all rows, W numbers in a dense row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GUARD = 256
"""Zero elements after each ragged plane, so that 255 entries can be read from anywhere in it."""


@dataclass(frozen=True, eq=False)
class EntryRows:
    """Rows of token ids, of which some or all have a value.

    counts_N: number of ids in each row. valued_N: number of ids at the start of each row that have
    a value (None: all); the others are draws that share the remaining mass. low_E, high_E: the
    lowest 16 bits of the ids and, if the vocabulary needs them, the next 8. values_X: probabilities
    or counts (u8, u16), log-probabilities or weights (f16). tail_N: the mass of all tokens without
    an entry (None: not stored).
    """

    counts_N: NDArray[np.uint8]
    valued_N: NDArray[np.uint8] | None
    low_E: NDArray[np.uint16]
    high_E: NDArray[np.uint8] | None
    values_X: NDArray[Any]
    tail_N: NDArray[np.float32] | None

    @classmethod
    def of(
        cls,
        vocabulary: int,
        counts_N: Tensor,
        ids_E: Tensor,
        values_X: NDArray[Any],
        *,
        valued_N: Tensor | None = None,
        tail_N: Tensor | None = None,
    ) -> EntryRows:
        """Convert torch tensors from any device."""
        low_E, high_E = split_ids(ids_E.cpu().numpy(), vocabulary)
        return cls(
            counts_N=_bytes(counts_N),
            valued_N=None if valued_N is None else _bytes(valued_N),
            low_E=low_E,
            high_E=high_E,
            values_X=values_X,
            tail_N=None if tail_N is None else tail_N.float().cpu().numpy(),
        )

    def __len__(self) -> int:
        return len(self.counts_N)

    @property
    def valued_counts(self) -> NDArray[np.uint8]:
        """The number of ids with a value in each row."""
        return self.counts_N if self.valued_N is None else self.valued_N


@dataclass(frozen=True, eq=False)
class DenseRows:
    """Rows of W bfloat16 numbers, as their 16 bits. scalar_N: one more number per row, or None."""

    bits_NW: NDArray[np.uint16]
    scalar_N: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.bits_NW)


Rows = EntryRows | DenseRows
RowsT = TypeVar("RowsT", EntryRows, DenseRows, Rows)


def concatenate(parts: Sequence[RowsT]) -> RowsT:
    """Concatenate parts, which must all have the same type."""
    first = parts[0]
    if len(parts) == 1:
        return first
    joined: dict[str, Any] = {
        field.name: None
        if getattr(first, field.name) is None
        else np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(first)
    }
    return type(first)(**joined)


def split_ids(ids_E: NDArray[Any], vocabulary: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Split ids into their lowest 16 bits and, if the vocabulary needs them, the next 8."""
    low_E = (ids_E & 0xFFFF).astype("<u2")
    return low_E, (ids_E >> 16).astype(np.uint8) if id_bytes(vocabulary) == 3 else None


def _bytes(counts_N: Tensor) -> NDArray[np.uint8]:
    return counts_N.to(torch.uint8).cpu().numpy()


def id_bytes(vocabulary: int) -> int:
    return 2 if vocabulary <= 1 << 16 else 3
