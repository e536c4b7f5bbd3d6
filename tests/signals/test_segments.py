"""A segment's key depends only on its tokens and its loss mask."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch

from stillhouse.data.shift import supervised_targets
from stillhouse.errors import SignalError
from stillhouse.signals.segments import find_segments
from tests.signals import toys


def key_by_hand(tokens: list[int], supervised: list[bool]) -> bytes:
    """The key of a segment as docs/signal-store.md describes it."""
    bits = "".join("01"[flag] for flag in supervised).ljust(-(-len(tokens) // 8) * 8, "0")
    mask = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    message = struct.pack(f"<{len(tokens)}I", *tokens) + mask
    return hashlib.blake2b(message, digest_size=16, person=b"stillhouse-seg-1").digest()


def test_keys_match_the_documentation() -> None:
    data = toys.batch()
    wanted = []
    for ids, labels, positions in zip(
        data.input_ids_RL.tolist(),
        data.labels_RL.tolist(),
        data.position_ids_RL.tolist(),
        strict=True,
    ):
        starts = [t for t, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            supervised = [label != -100 for label in labels[start:end]]
            if any(supervised):
                wanted.append((key_by_hand(ids[start:end], supervised), sum(supervised)))
    assert list(zip(data.segments.keys, data.segments.rows_S.tolist(), strict=True)) == wanted


def test_there_is_one_row_per_supervised_target() -> None:
    data = toys.batch()
    assert data.segments.rows == len(supervised_targets(data.labels_RL))


def test_keys_do_not_depend_on_the_window() -> None:
    data = toys.batch(windows=2)
    cut = int((data.position_ids_RL[0] == 0).nonzero()[1])
    alone = find_segments(data.input_ids_RL[:1, :cut], data.labels_RL[:1, :cut])
    assert alone.keys == data.segments.keys[:1]


def test_a_different_loss_mask_changes_the_key() -> None:
    data = toys.batch(windows=1)
    labels_RL = data.labels_RL.clone()
    labels_RL[0, 1] = -100
    other = find_segments(data.input_ids_RL, labels_RL, data.position_ids_RL)
    assert other.keys[0] != data.segments.keys[0]
    assert other.keys[1:] == data.segments.keys[1:]


def test_a_label_that_no_position_predicts_is_rejected() -> None:
    data = toys.batch(windows=1)
    start = int((data.position_ids_RL[0] == 0).nonzero()[1])
    data.labels_RL[0, start] = 1
    with pytest.raises(SignalError, match=f"token {start}"):
        find_segments(data.input_ids_RL, data.labels_RL, data.position_ids_RL)


def test_without_labels_there_are_no_segments() -> None:
    ids_RL = torch.zeros(2, 9, dtype=torch.long)
    assert len(find_segments(ids_RL, torch.full_like(ids_RL, -100))) == 0
