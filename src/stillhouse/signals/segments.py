"""Division of a batch of windows into segments, each identified by a hash of its content.

A segment is a run of tokens from one restart of position_ids to the next. The teacher's output
inside it depends only on its own tokens, so stored rows can be found by the segment's content, in
any window, batch, or process.

Shapes: R windows, L tokens in a window, S segments with a supervised token, N supervised tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import SignalError

KEY_BYTES = 16
KEY_VERSION = b"stillhouse-seg-1"
"""BLAKE2b's `person`: change it whenever the rules for segmenting or hashing change."""
IGNORED = -100
"""The label of a token that is not supervised."""


@dataclass(frozen=True)
class Segments:
    """The segments of a batch that have a supervised token, in the batch's row-major order.

    keys: KEY_BYTES bytes each. rows_S: number of supervised tokens in each. Row n of the batch (its
    n-th supervised token in row-major order) belongs to segment `segment_of_rows()[n]`. spans: the
    first token and the one after the last, counted over the whole batch; () for segments that do
    not come from a batch.
    """

    keys: tuple[bytes, ...]
    rows_S: NDArray[np.int64]
    spans: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def rows(self) -> int:
        return int(self.rows_S.sum())

    def segment_of_rows(self) -> NDArray[np.int64]:
        """The segment of each row, [N]."""
        return np.repeat(np.arange(len(self)), self.rows_S)

    def chosen_rows(self, chosen_S: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the N rows belong to the chosen segments."""
        return np.repeat(chosen_S, self.rows_S)

    def only(self, chosen_S: NDArray[np.bool_]) -> Segments:
        """The chosen segments, in their order."""
        keys = tuple(itertools.compress(self.keys, chosen_S))
        return Segments(
            keys, self.rows_S[chosen_S], tuple(itertools.compress(self.spans, chosen_S))
        )


def find_segments(
    input_ids_RL: Tensor, labels_RL: Tensor, position_ids_RL: Tensor | None = None
) -> Segments:
    """Find the segments of a batch. Without `position_ids_RL`, each window is one segment.

    labels_RL[r, t] is the token at t if it is supervised, otherwise -100; labels in the first
    column are ignored. A segment's key is a BLAKE2b digest of 16 bytes with the personalization
    `stillhouse-seg-1`, over the ids as little-endian 32-bit integers, followed by one bit per token
    for whether it is supervised, eight to a byte with the first in the highest bit.

    Raises SignalError: a wrong shape, or a label on the first token of a segment inside a window,
    which nothing in the segment predicts.
    """
    ids_RL = np.ascontiguousarray(_numpy(input_ids_RL), dtype="<u4")
    supervised_RL = _numpy(labels_RL) != IGNORED
    if ids_RL.ndim != 2 or supervised_RL.shape != ids_RL.shape:
        raise SignalError(
            f"input_ids has shape {ids_RL.shape}, and labels has shape {supervised_RL.shape}",
            fix="pass both as [windows, tokens]",
        )
    starts_RL = np.zeros(ids_RL.shape, dtype=np.bool_)
    if position_ids_RL is not None:
        position_RL = _numpy(position_ids_RL)
        starts_RL[:, 1:] = position_RL[:, 1:] != position_RL[:, :-1] + 1
    if (starts_RL & supervised_RL).any():
        window, at = np.argwhere(starts_RL & supervised_RL)[0]
        raise SignalError(
            "the first token of a segment is supervised, but nothing in the segment predicts it",
            where=f"window {window}, token {at}",
            fix="set the label of each segment's first token to -100",
        )
    starts_RL[:, 0] = True
    supervised_RL[:, 0] = False
    starts_S = np.flatnonzero(starts_RL)
    rows_S = np.add.reduceat(supervised_RL.ravel(), starts_S, dtype=np.int64)
    ends_S = np.append(starts_S[1:], ids_RL.size)
    used = rows_S > 0
    spans = tuple(zip(starts_S[used].tolist(), ends_S[used].tolist(), strict=True))
    tokens, flags = memoryview(ids_RL.tobytes()), supervised_RL.ravel()
    return Segments(tuple(_key(tokens, flags, *span) for span in spans), rows_S[used], spans)


def _key(tokens: memoryview, flags: NDArray[np.bool_], start: int, end: int) -> bytes:
    digest = hashlib.blake2b(tokens[4 * start : 4 * end], digest_size=KEY_BYTES, person=KEY_VERSION)
    digest.update(np.packbits(flags[start:end]).tobytes())
    return digest.digest()


def _numpy(tensor: Tensor) -> NDArray[np.int64]:
    return tensor.detach().cpu().numpy()
