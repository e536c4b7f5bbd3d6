"""A killed writer loses at most one shard, and damaged data is never read as a signal."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillhouse.errors import StillhouseError
from stillhouse.signals import store as store_module
from stillhouse.signals.encodings import Encoding, Hidden, Threshold, TopP
from stillhouse.signals.manifest import Settings, write_checked_json
from stillhouse.signals.record import Recorder
from stillhouse.signals.store import open_store
from stillhouse.signals.verify import info, verify
from stillhouse.signals.writer import StoreWriter, finish_store
from tests import forks
from tests.signals import toys

KILLS, FLIPS = 30, 1200
FORK = multiprocessing.get_context("fork")


def write_slowly(
    path: Path, of: Settings, data: toys.Batch, share: int = 0, shares: int = 1
) -> None:
    """Records one segment at a time in tiny shards, with a delay in every `fsync`."""
    true_fsync = os.fsync

    def slow_fsync(fd: int) -> None:
        time.sleep(0.001)
        true_fsync(fd)

    forks.patch(os, "fsync", slow_fsync)
    recorder = Recorder(of)
    with StoreWriter(path, of, most_bytes=600) as writer:
        for number in range(share, len(data.segments), shares):
            chosen_S = np.arange(len(data.segments)) == number
            chosen_S &= writer.missing(data.segments)
            segments, answer = data.part(chosen_S)
            if len(segments):
                writer.add(segments, *recorder.encode(segments, answer))
    os._exit(0)


@pytest.mark.run
def test_a_writer_killed_at_any_point_resumes_to_the_same_store(tmp_path: Path) -> None:
    data, chance = toys.batch(windows=16), random.Random(0)
    of = toys.settings(Threshold(0.05))
    toys.record(tmp_path / "undisturbed", of, data)
    wanted = open_store(tmp_path / "undisturbed").read(data.segments)
    kills = stores = 0
    while kills < KILLS:
        path, finished = tmp_path / str(stores), False
        stores += 1
        while not finished:
            writer = FORK.Process(target=write_slowly, args=(path, of, data))
            writer.start()
            if kills < KILLS:
                writer.join(timeout=chance.uniform(0.002, 0.05))
            else:
                writer.join(timeout=60)
            if writer.is_alive():
                assert writer.pid is not None
                os.kill(writer.pid, signal.SIGKILL)
                kills += 1
            writer.join()
            finished = writer.exitcode == 0
        finish_store(path)
        assert verify(path) == []
        found = open_store(path).read(data.segments)
        wanted_NV = toys.estimate(wanted, toys.VOCABULARY)
        assert (toys.estimate(found, toys.VOCABULARY) == wanted_NV).all()


@pytest.mark.run
def test_several_processes_write_one_store(tmp_path: Path) -> None:
    data = toys.batch(windows=12)
    of = toys.settings(Threshold(0.05))
    writers = [
        FORK.Process(target=write_slowly, args=(tmp_path, of, data, share, 3)) for share in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    manifest = finish_store(tmp_path)
    assert verify(tmp_path) == []
    assert manifest.rows == data.segments.rows
    assert open_store(tmp_path).covers(data.segments)


@pytest.mark.run
@pytest.mark.parametrize("encoding", [Threshold(0.1), TopP(0.5, most=9), Hidden((2,), 4)], ids=repr)
def test_a_flipped_bit_is_found_and_never_read(tmp_path: Path, encoding: Encoding) -> None:
    data, chance = toys.batch(windows=2), random.Random(1)
    of = toys.settings(encoding)
    if isinstance(encoding, Hidden):
        record_hidden(tmp_path, of, data)
    else:
        toys.record(tmp_path, of, data, shards=2)
    wanted = open_store(tmp_path).read(data.segments)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert len(files) == 4
    whole = {file: file.read_bytes() for file in files}
    sizes = [len(data) for data in whole.values()]
    for _ in range(FLIPS // 3):
        file = chance.choices(files, weights=sizes)[0]
        damaged = bytearray(whole[file])
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        problems = verify(tmp_path)
        assert any(file.name in str(problem) for problem in problems), file
        try:
            found = open_store(tmp_path).read(data.segments)
        except StillhouseError:
            pass
        else:
            assert file.name == "settings.json"  # which a reader does not use
            assert toys.same(found, wanted)
        file.write_bytes(whole[file])
    assert verify(tmp_path) == []


def record_hidden(path: Path, of: Settings, data: toys.Batch) -> None:
    from stillhouse.signals import HiddenSignal

    with StoreWriter(path, of) as writer:
        half_S = np.arange(len(data.segments)) % 2 == 0
        for chosen_S in (half_S, ~half_S):
            segments, answer = data.part(chosen_S)
            part = HiddenSignal({2: answer.logits_NV[:, :4]})
            writer.add(segments, *Recorder(of).encode(segments, part))
            writer.flush()
        writer.finish()


@pytest.mark.parametrize("change", ["cut", "longer", "gone", "empty"])
def test_the_error_names_an_incomplete_shard(tmp_path: Path, change: str) -> None:
    data = toys.batch(windows=2)
    toys.record(tmp_path, toys.settings(Threshold(0.05)), data, shards=2)
    shard = sorted((tmp_path / "shards").iterdir())[0]
    whole = shard.read_bytes()
    if change == "gone":
        shard.unlink()
    else:
        shard.write_bytes({"cut": whole[:-9], "longer": whole + b"\0", "empty": b""}[change])
    assert shard.name in str(verify(tmp_path)[0])
    with pytest.raises(StillhouseError, match=shard.name):
        open_store(tmp_path).read(data.segments)


def test_settings_in_place_of_the_manifest_are_rejected(tmp_path: Path) -> None:
    """The settings have a valid checksum, too."""
    toys.record(tmp_path, toys.settings(Threshold(0.05)), toys.batch(windows=2))
    (tmp_path / "manifest.json").write_bytes((tmp_path / "settings.json").read_bytes())
    assert "not a manifest" in str(verify(tmp_path)[0])
    with pytest.raises(StillhouseError, match="not a manifest"):
        open_store(tmp_path)


@pytest.mark.parametrize("listed", [True, False])
def test_a_flipped_bit_is_found_with_either_checksum(tmp_path: Path, listed: bool) -> None:
    """Older manifests list only a CRC-32."""
    data = toys.batch(windows=2)
    toys.record(tmp_path, toys.settings(Threshold(0.05)), data)
    store = open_store(tmp_path)
    (entry,) = store.manifest.shards
    assert entry.xxh3 is not None
    assert len(entry.xxh3) == 32
    older = replace(store.manifest, shards=(replace(entry, xxh3=entry.xxh3 if listed else None),))
    assert older.digest() == store.manifest.digest()
    write_checked_json(tmp_path / "manifest.json", older.to_json())
    open_store(tmp_path).read(data.segments)
    assert verify(tmp_path) == []
    shard = tmp_path / "shards" / entry.name
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StillhouseError, match="its checksum does not match"):
        open_store(tmp_path).read(data.segments)


@pytest.fixture
def few_files() -> Iterator[None]:
    """Lets the test open only twelve more files than are open already."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = {int(name) for name in os.listdir("/dev/fd")}
    free = [number for number in range(limits[0]) if number not in opened]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[12], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def many_shards(path: Path, data: toys.Batch) -> None:
    of = toys.settings(Threshold(0.05))
    with StoreWriter(path, of) as writer:
        for number in range(len(data.segments)):
            part = data.part(np.arange(len(data.segments)) == number)
            writer.add(part[0], *Recorder(of).encode(*part))
            writer.flush()
        writer.finish()
    assert len(list((path / "shards").iterdir())) == len(data.segments) > 12


@pytest.mark.run
def test_a_store_may_have_more_shards_than_the_limit_of_open_files(
    tmp_path: Path, few_files: None
) -> None:
    data = toys.batch(windows=12)
    many_shards(tmp_path, data)
    assert verify(tmp_path) == []
    assert info(tmp_path).manifest.segments == len(data.segments)
    found = open_store(tmp_path).read(data.segments)
    assert toys.estimate(found, toys.VOCABULARY).shape[0] == data.segments.rows


def test_a_shard_that_cannot_be_opened_is_not_reported_as_damaged(
    tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = toys.batch(windows=12)
    many_shards(tmp_path, data)
    monkeypatch.setattr(store_module, "allow_open_files", lambda files: None)
    with pytest.raises(StillhouseError, match="Too many open files") as caught:
        open_store(tmp_path).read(data.segments)
    assert "ulimit -n" in str(caught.value.fix)


def test_a_shard_missing_from_the_manifest_is_reported_and_not_read(tmp_path: Path) -> None:
    data = toys.batch(windows=2)
    of = toys.settings(Threshold(0.05))
    toys.record(tmp_path, of, data)
    more = toys.batch(windows=2, seed=7)
    with StoreWriter(tmp_path, of) as writer:
        writer.add(more.segments, *Recorder(of).encode(*more.part(np.ones(4, bool))))
    assert "does not list" in str(verify(tmp_path)[0])
    assert not open_store(tmp_path).covers(more.segments)
    finish_store(tmp_path)
    assert open_store(tmp_path).covers(more.segments)
