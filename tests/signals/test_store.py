"""A store returns what was recorded for any batch of recorded segments, and rejects others."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.errors import SignalError, StoreError
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import (
    FrozenHeadSignal,
    HiddenSignal,
    LMHead,
    LogitsSignal,
    SampledSignal,
    SparseSignal,
)
from stillhouse.signals.encodings import (
    EntryEncoding,
    FrozenHead,
    Hidden,
    Sampled,
    Threshold,
    TopK,
    TopP,
)
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import Segments, find_segments
from stillhouse.signals.store import Store, open_store
from stillhouse.signals.verify import info, verify
from stillhouse.signals.writer import StoreWriter
from tests.signals import toys
from tests.signals.decoding import decode


def recorded(
    path: Path, encoding: EntryEncoding, data: toys.Batch, shards: int = 3, **changes: Any
) -> Store:
    of = toys.settings(encoding, data.logits_NV.shape[1], **changes)
    toys.record(path, of, data, shards)
    return open_store(path)


@pytest.mark.parametrize("vocabulary", [300, 66_000])
@pytest.mark.parametrize("encoding", toys.ENTRY_ENCODINGS, ids=repr)
def test_reading_returns_what_was_encoded(
    tmp_path: Path, encoding: EntryEncoding, vocabulary: int
) -> None:
    data = toys.batch(windows=3, vocabulary=vocabulary)
    store = recorded(tmp_path, encoding, data)
    rows, _ = Recorder(store.settings).encode(data.segments, LogitsSignal(data.logits_NV))
    wanted = decode(encoding, rows)
    found = store.read(data.segments)
    if isinstance(wanted, SparseSignal):
        assert toys.same(found, wanted)
    else:  # padding differs: values after a row's last entry have no meaning
        p_NV = toys.estimate(wanted, vocabulary)
        assert torch.equal(toys.estimate(found, vocabulary), p_NV)
    assert int(found.ids_NK.max()) < vocabulary
    assert verify(tmp_path) == []


@pytest.mark.parametrize("encoding", toys.ENTRY_ENCODINGS, ids=repr)
def test_objectives_accept_the_signals_of_a_store(tmp_path: Path, encoding: EntryEncoding) -> None:
    data = toys.batch(windows=2)
    signal = recorded(tmp_path, encoding, data).read(data.segments)
    assert isinstance(signal, SparseSignal | SampledSignal)
    head = LMHead(torch.randn(toys.VOCABULARY, 8))
    hidden_ND = torch.randn(data.segments.rows, 8)
    result = fused_loss(hidden_ND, head, [Term("forward_kl")], signal=signal)
    assert torch.isfinite(result.total)


def test_rows_are_found_in_any_batch_of_windows(tmp_path: Path) -> None:
    data = toys.batch(windows=8)
    store = recorded(tmp_path, Threshold(0.05), data)
    whole_NV = toys.estimate(store.read(data.segments), toys.VOCABULARY)
    for chosen in ([3], [7, 0], [5, 5, 1], list(range(7, -1, -1))):
        segments = find_segments(
            data.input_ids_RL[chosen], data.labels_RL[chosen], data.position_ids_RL[chosen]
        )
        windows_N = (data.labels_RL != -100).nonzero()[:, 0]
        wanted_NV = torch.cat([whole_NV[windows_N == window] for window in chosen])
        found_NV = toys.estimate(store.read(segments), toys.VOCABULARY)
        torch.testing.assert_close(found_NV, wanted_NV)


def test_rows_are_found_after_segments_are_packed_differently(tmp_path: Path) -> None:
    data = toys.batch(windows=2)
    store = recorded(tmp_path, TopK(4), data)
    first = [int((positions == 0).nonzero()[1]) for positions in data.position_ids_RL]
    swapped = [
        torch.cat([rows[window, first[window] :], rows[window, : first[window]]])
        for window in (0, 1)
        for rows in (data.input_ids_RL, data.labels_RL, data.position_ids_RL)
    ]
    segments = find_segments(*(torch.stack([swapped[i], swapped[i + 3]]) for i in range(3)))
    assert sorted(segments.keys) == sorted(data.segments.keys)
    ids_of: dict[bytes, np.ndarray] = {}
    for at, signal in (
        (data.segments, store.read(data.segments)),
        (segments, store.read(segments)),
    ):
        bounds = np.cumsum(at.rows_S)[:-1].tolist()
        for key, ids in zip(at.keys, np.split(signal.ids_NK.numpy(), bounds), strict=True):
            assert np.array_equal(ids_of.setdefault(key, ids), ids)


def test_draws_depend_only_on_the_seed_and_the_segment(tmp_path: Path) -> None:
    data = toys.batch()
    stores = [
        recorded(tmp_path / "one", Sampled(20), data, shards=1),
        recorded(tmp_path / "other order", Sampled(20), data, shards=5),
        recorded(tmp_path / "other seed", Sampled(20), data, seed=1),
    ]
    one, order, seed = (toys.estimate(s.read(data.segments), toys.VOCABULARY) for s in stores)
    assert torch.equal(one, order)
    assert not torch.equal(one, seed)


def test_dense_encodings_return_what_was_recorded(tmp_path: Path) -> None:
    data = toys.batch(windows=2)
    weight_VD = torch.randn(toys.VOCABULARY, 8)
    of = toys.settings(FrozenHead(8))
    with StoreWriter(tmp_path / "frozen", of) as writer:
        answer = Recorder(of, weight_VD).encode(data.segments, LogitsSignal(data.logits_NV))
        writer.add(data.segments, *answer)
        writer.finish()
    frozen = open_store(tmp_path / "frozen").read(data.segments)
    assert isinstance(frozen, FrozenHeadSignal)
    wanted_ND = data.logits_NV.softmax(1) @ weight_VD
    torch.testing.assert_close(frozen.vector_ND.float(), wanted_ND, atol=0.02, rtol=0.01)

    hidden = HiddenSignal(
        {3: torch.randn(data.segments.rows, 5), 1: torch.randn(data.segments.rows, 5)}
    )
    of = toys.settings(Hidden((3, 1), 5))
    with StoreWriter(tmp_path / "hidden", of) as writer:
        writer.add(data.segments, *Recorder(of).encode(data.segments, hidden))
        writer.finish()
    found = open_store(tmp_path / "hidden").read(data.segments)
    assert isinstance(found, HiddenSignal)
    for layer, rows_ND in hidden.hidden_ND.items():
        assert torch.equal(found.hidden_ND[layer], rows_ND.bfloat16())
    assert verify(tmp_path / "frozen") == verify(tmp_path / "hidden") == []


# --- missing segments and other stores -------------------------------------------------------


def test_missing_segments_are_rejected_with_their_count(tmp_path: Path) -> None:
    data, more = toys.batch(windows=2), toys.batch(windows=4, seed=9)
    store = recorded(tmp_path, TopK(4), data)
    both = Segments(
        data.segments.keys + more.segments.keys,
        np.concatenate([data.segments.rows_S, more.segments.rows_S]),
    )
    assert store.covers(data.segments)
    assert not store.covers(both)
    assert store.missing(both).tolist() == [False] * 4 + [True] * 8
    with pytest.raises(SignalError, match="lacks 8 of 12 segments"):
        store.read(both)


@pytest.mark.parametrize("encoding", toys.ENTRY_ENCODINGS, ids=repr)
def test_missing_segments_may_be_scored_by_a_live_teacher(
    tmp_path: Path, encoding: EntryEncoding
) -> None:
    data = toys.batch(windows=4)
    held_S = np.arange(len(data.segments)) % 3 > 0
    of = toys.settings(encoding)
    with StoreWriter(tmp_path, of) as writer:
        segments, answer = data.part(held_S)
        writer.add(segments, *Recorder(of).encode(segments, answer))
        writer.finish()
    store = open_store(tmp_path)
    segments, answer = data.part(store.missing(data.segments))
    live, _ = Recorder(store.settings).encode(segments, answer)
    found_NV = toys.estimate(store.read(data.segments, live), toys.VOCABULARY)
    rows, _ = Recorder(of).encode(data.segments, LogitsSignal(data.logits_NV))
    assert torch.equal(found_NV, toys.estimate(decode(encoding, rows), toys.VOCABULARY))


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"expect": {"teacher": "cccc"}}, "different teacher: it has aaaa, and this run has cccc"),
        (
            {"expect": {"template": "dddd"}},
            "different template: it has None, and this run has dddd",
        ),
        ({"temperature": 2.0}, "different temperature: it has 1.0, and this run has 2.0"),
        ({"vocabulary": 299}, "different vocabulary: it has 300, and this run has 299"),
    ],
)
def test_a_store_with_other_settings_than_expected_is_rejected(
    tmp_path: Path, expected: dict[str, Any], said: str
) -> None:
    recorded(tmp_path, TopK(4), toys.batch(windows=1))
    with pytest.raises(SignalError, match=said):
        open_store(tmp_path, **expected)
    assert open_store(tmp_path, toys.IDENTITY, temperature=1, vocabulary=300)


def test_a_store_cannot_be_resumed_with_other_settings(tmp_path: Path) -> None:
    recorded(tmp_path, TopK(4), toys.batch(windows=1))
    with pytest.raises(SignalError, match="a different encoding"):
        StoreWriter(tmp_path, toys.settings(TopK(5)))
    with pytest.raises(SignalError, match="a different seed"):
        StoreWriter(tmp_path, toys.settings(TopK(4), seed=3))


def test_a_shard_of_another_store_is_reported(tmp_path: Path) -> None:
    recorded(tmp_path / "a", TopK(4), toys.batch(windows=1), shards=1)
    recorded(tmp_path / "b", TopK(4), toys.batch(windows=1), shards=1, seed=1)
    (ours,), (theirs,) = ((tmp_path / n / "shards").glob("*.bin") for n in "ab")
    theirs.replace(ours)
    assert "belongs to a different store" in str(verify(tmp_path / "a")[0])


# --- writing and resuming --------------------------------------------------------------------


def test_an_unfinished_store_is_reported(tmp_path: Path) -> None:
    data = toys.batch(windows=2)
    of = toys.settings(TopK(4))
    with StoreWriter(tmp_path, of) as writer:
        writer.add(data.segments, *Recorder(of).encode(*data.part(np.ones(4, bool))))
    assert info(tmp_path).finished is False
    assert info(tmp_path).manifest.rows == data.segments.rows
    with pytest.raises(StoreError, match="not finished"):
        open_store(tmp_path)
    with StoreWriter(tmp_path, of) as writer:
        assert not writer.missing(data.segments).any()
        manifest = writer.finish()
    assert info(tmp_path).finished
    assert manifest.rows == data.segments.rows
    assert dict(info(tmp_path).lines())["encoding"] == "top_k (k 4, tail True)"


def test_equal_segments_are_recorded_once(tmp_path: Path) -> None:
    data = toys.batch(windows=1)
    twice = Segments(data.segments.keys * 2, np.tile(data.segments.rows_S, 2))
    with StoreWriter(tmp_path, toys.settings(TopK(4))) as writer:
        assert writer.missing(twice).tolist() == [True, True, False, False]


def test_recording_resumes_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = toys.batch(windows=4)
    of = toys.settings(TopK(4))
    writes = iter([None] * 3)  # the settings file, its folder, and the first shard's file

    def fsync(handle: int, true_fsync: Callable[[int], None] = os.fsync) -> None:
        if next(writes, "full") == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        true_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="the disk is full"):
        toys.record(tmp_path, of, data, shards=4)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    toys.record(tmp_path, of, data, shards=4)
    assert verify(tmp_path) == []
    assert open_store(tmp_path).covers(data.segments)


def test_a_shard_is_closed_when_it_reaches_the_size_limit(tmp_path: Path) -> None:
    data = toys.batch(windows=6)
    of, recorder = toys.settings(TopK(4)), Recorder(toys.settings(TopK(4)))
    with StoreWriter(tmp_path, of, most_bytes=500) as writer:
        for number in range(len(data.segments)):
            segments, answer = data.part(np.arange(len(data.segments)) == number)
            writer.add(segments, *recorder.encode(segments, answer))
        manifest = writer.finish()
    assert len(manifest.shards) > 3
    assert manifest.quality.captured_mass < 1


def test_padding_of_short_rows_does_not_change_the_loss(tmp_path: Path) -> None:
    """With top_p, rows of different lengths have the loss and gradient that each has alone."""
    data = toys.batch(windows=1)
    signal = recorded(tmp_path, TopP(0.8, most=20), data).read(data.segments)
    assert isinstance(signal, SparseSignal)
    head = LMHead(torch.randn(toys.VOCABULARY, 8, requires_grad=True))
    for name in ("forward_kl", "reverse_kl", "jsd"):
        hidden_ND = torch.randn(data.segments.rows, 8, requires_grad=True)
        together = fused_loss(hidden_ND, head, [Term(name)], signal=signal)
        together.total.backward()
        alone = 0.0
        for n in range(data.segments.rows):
            kept_K = signal.log_probs_NK[n] > -torch.inf
            row = SparseSignal(
                signal.ids_NK[n : n + 1, kept_K],
                signal.log_probs_NK[n : n + 1, kept_K],
                signal.tail_N[n : n + 1],
            )
            h_1D = hidden_ND.detach()[n : n + 1].requires_grad_()
            loss = fused_loss(h_1D, head, [Term(name)], signal=row).total
            loss.backward()
            assert hidden_ND.grad is not None
            assert h_1D.grad is not None
            torch.testing.assert_close(hidden_ND.grad[n], h_1D.grad[0], atol=1e-4, rtol=1e-4)
            alone += loss.item()
        assert together.total.item() == pytest.approx(alone, rel=1e-4)
