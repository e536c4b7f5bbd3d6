"""Verification of a complete store, and a summary of its content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillhouse.errors import SignalError, StillhouseError, StoreError
from stillhouse.signals.encoded_rows import EntryRows
from stillhouse.signals.folded_store import read_fold
from stillhouse.signals.manifest import (
    MANIFEST,
    SHARDS,
    Manifest,
    Settings,
    ShardEntry,
    check_same,
    read_manifest,
    read_settings,
)
from stillhouse.signals.shards import Shard, ShardHeader, open_shard
from stillhouse.signals.writer import describe, open_shards

_AGAIN = "delete this file, record its segments again, and finish the store"


def verify(path: Path) -> list[StillhouseError]:
    """List all errors in a finished store.

    Checksums cover every byte of every file. This also checks that counts add up, ids are in the
    vocabulary, no shard repeats a key, the manifest lists all shards, and its figures match the
    shards.
    """
    try:
        settings = read_settings(path)
        manifest = read_manifest(path)
        check_same(manifest.settings, settings, path)
    except (StoreError, SignalError) as error:
        return [error]
    wrong: list[StillhouseError] = []
    found = []
    for listed in manifest.shards:
        try:
            found.append(_sound_shard(path / SHARDS / listed.name, listed, settings))
        except StoreError as error:
            wrong.append(error)
    try:
        read_fold(path, settings)
    except StoreError as error:
        wrong.append(error)
    names = {listed.name for listed in manifest.shards}
    wrong.extend(
        StoreError(
            "the manifest does not list this file",
            where=file,
            fix="record the store again to finish it, or delete the file",
        )
        for file in sorted((path / SHARDS).glob("*"))
        if file.name not in names
    )
    if not wrong and describe(settings, found) != manifest:
        wrong.append(
            StoreError(
                "the manifest's figures do not match the shards",
                where=path / MANIFEST,
                fix="delete the manifest, and record the store again to finish it",
            )
        )
    return wrong


def _sound_shard(
    file: Path, listed: ShardEntry, settings: Settings
) -> tuple[ShardHeader, ShardEntry]:
    """Check a shard and return its summary. Raises StoreError if anything is wrong with it."""
    shard = open_shard(file, settings)
    header, entry = shard.summary()
    if entry != listed:
        message = f"the manifest lists {listed}, but the file has {entry}"
        raise StoreError(message, where=file, fix=_AGAIN)
    if len(set(shard.keys_S)) != len(shard.keys_S):
        raise StoreError("a segment is in the shard twice", where=file, fix=_AGAIN)
    rows = shard.rows
    if isinstance(rows, EntryRows) and header.entries:
        ids_E = rows.low_E[: header.entries].astype("u4")
        if rows.high_E is not None:
            ids_E |= rows.high_E[: header.entries].astype("u4") << 16
        if int(ids_E.max()) >= settings.vocabulary:
            raise StoreError(
                f"the shard contains the id {int(ids_E.max())}, but the vocabulary has "
                f"{settings.vocabulary} tokens",
                where=file,
                fix=_AGAIN,
            )
    return header, entry


@dataclass(frozen=True)
class Info:
    """Summary of a store. finished: whether it has a manifest and can be read."""

    finished: bool
    manifest: Manifest

    def lines(self) -> list[tuple[str, str]]:
        """Rows (name, value) of a table."""
        raw, quality = self.manifest.to_json(), self.manifest.quality
        encoding = dict(raw["encoding"])
        parameters = ", ".join(f"{name} {value}" for name, value in list(encoding.items())[1:])
        return [
            ("encoding", f"{encoding['kind']} ({parameters})"),
            ("read as", raw["signal"]),
            ("serves", raw["serves"]),
            ("bias", raw["bias"]),
            ("supervised tokens", f"{self.manifest.rows:,}"),
            ("segments", f"{self.manifest.segments:,}"),
            ("shards", f"{len(self.manifest.shards):,}"),
            ("bytes", f"{self.manifest.bytes:,}"),
            ("bytes per token", f"{quality.bytes:.1f}"),
            ("entries per token", f"{quality.entries:.1f}"),
            ("captured mass", f"{quality.captured_mass:.4f}"),
            ("variance per token", f"{quality.variance:.3g}"),
            ("squared bias per token", f"{quality.squared_bias:.3g}"),
            ("temperature", f"{raw['temperature']:g}"),
            ("vocabulary", f"{raw['vocabulary']:,}"),
            ("seed", str(raw["seed"])),
            *raw["identity"].items(),
            *raw["provenance"].items(),
            ("state", "finished" if self.finished else "not finished"),
        ]


def info(path: Path) -> Info:
    """Summarize a store, finished or not. Raises StoreError if there is none or it is damaged."""
    if (path / MANIFEST).exists():
        return Info(True, read_manifest(path))
    settings = read_settings(path)
    return Info(False, describe(settings, map(Shard.summary, open_shards(path, settings))))
