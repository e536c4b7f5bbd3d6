"""Exporting stores to Parquet, and uploading them to the Hub and downloading them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from stillhouse.errors import StoreError
from stillhouse.signals import store_hub as hub
from stillhouse.signals.encodings import EntryEncoding, Threshold, TopP
from stillhouse.signals.parquet_export import export_parquet
from stillhouse.signals.segments import Segments
from stillhouse.signals.store import open_store
from tests.signals import toys


@pytest.mark.parametrize("encoding", [Threshold(0.05), TopP(0.8, most=20)], ids=repr)
def test_the_parquet_file_contains_every_row(tmp_path: Path, encoding: EntryEncoding) -> None:
    data = toys.batch(windows=3)
    toys.record(tmp_path / "store", toys.settings(encoding), data, shards=2)
    out = tmp_path / "signals.parquet"
    assert export_parquet(tmp_path / "store", out) == data.segments.rows
    table = pq.read_table(out)
    meta = json.loads(table.schema.metadata[b"stillhouse"])
    assert meta["encoding"]["kind"] == encoding.kind

    by_key: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_key.setdefault(row["key"], []).append(row)
    store = open_store(tmp_path / "store")
    for key, count in zip(data.segments.keys, data.segments.rows_S, strict=True):
        rows = by_key.pop(key.hex())
        assert [row["position"] for row in rows] == list(range(count))
        p_NV = toys.estimate(store.read(Segments((key,), np.array([count]))), toys.VOCABULARY)
        for row, p_V in zip(rows, p_NV, strict=True):
            found_V = torch.zeros(toys.VOCABULARY)
            found_V.index_add_(0, torch.tensor(row["ids"]), torch.tensor(row["probabilities"]))
            torch.testing.assert_close(found_V, p_V)
            if "tail" in row:
                assert row["tail"] == pytest.approx(1 - sum(row["probabilities"]), abs=2e-3)
    assert not by_key


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_during_a_parquet_export_is_one_message(tmp_path: Path) -> None:
    toys.record(tmp_path / "store", toys.settings(TopP(0.8, most=20)), toys.batch(windows=1))
    (tmp_path / "signals.parquet").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="the disk is full") as caught:
        export_parquet(tmp_path / "store", tmp_path / "signals.parquet")
    assert "free some space" in str(caught.value.fix)


@pytest.mark.parametrize("earlier", [None, b"an earlier export"], ids=["new", "again"])
def test_a_failed_export_leaves_no_partial_file(tmp_path: Path, earlier: bytes | None) -> None:
    data = toys.batch(windows=3)
    toys.record(tmp_path / "store", toys.settings(TopP(0.8, most=20)), data, shards=2)
    out = tmp_path / "out" / "signals.parquet"
    out.parent.mkdir()
    if earlier is not None:
        out.write_bytes(earlier)
    last = open_store(tmp_path / "store").manifest.shards[-1]
    damaged = tmp_path / "store" / "shards" / last.name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(StoreError, match="its header says"):
        export_parquet(tmp_path / "store", out)
    assert [path.read_bytes() for path in out.parent.iterdir()] == ([earlier] if earlier else [])


class FakeHub:
    """Keeps uploads in a folder and returns them as downloads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.asked.append((repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> SimpleNamespace:
        shutil.copytree(folder_path, self.folder / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, local_dir: Path, **_: Any) -> None:
        shutil.copytree(self.folder / repo_id, local_dir)


def test_a_store_downloaded_from_the_hub_equals_the_uploaded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, fake = toys.batch(windows=2), FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    toys.record(tmp_path / "store", toys.settings(Threshold(0.05)), data)
    assert hub.upload_store(tmp_path / "store", "me/signals").endswith("me/signals/commit/1")
    assert fake.asked == [
        ("me/signals", {"repo_type": "dataset", "private": True, "exist_ok": True})
    ]
    hub.download_store("me/signals", tmp_path / "copy")
    found = open_store(tmp_path / "copy").read(data.segments)
    assert toys.same(found, open_store(tmp_path / "store").read(data.segments))


def test_a_damaged_store_is_not_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    toys.record(tmp_path / "store", toys.settings(Threshold(0.05)), toys.batch(windows=1))
    (shard,) = (tmp_path / "store" / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match="the store is damaged"):
        hub.upload_store(tmp_path / "store", "me/signals")
    assert fake.asked == []


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_errors_of_the_hub_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("no such repository")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    with pytest.raises(StoreError, match=r"download failed \(no such"):
        hub.download_store("me/nothing", tmp_path / "copy")
    toys.record(tmp_path / "store", toys.settings(Threshold(0.05)), toys.batch(windows=1))
    with pytest.raises(StoreError, match=r"upload failed \(no such"):
        hub.upload_store(tmp_path / "store", "me/nothing")


def test_an_invalid_repository_name_is_one_message(tmp_path: Path) -> None:
    toys.record(tmp_path / "store", toys.settings(Threshold(0.05)), toys.batch(windows=1))
    with pytest.raises(StoreError, match="Repo id must"):
        hub.upload_store(tmp_path / "store", "two words/and/slashes")
