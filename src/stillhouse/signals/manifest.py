"""A store's settings, fixed when it is created, its manifest, and the writing of its files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.atomic_files import complete_or_absent, flush
from stillhouse.errors import SignalError, StoreError
from stillhouse.signals.encodings import Encoding, encoding_from_json, encoding_to_json

FORMAT = 1
SETTINGS, MANIFEST, SHARDS = "settings.json", "manifest.json", "shards"


@dataclass(frozen=True)
class Settings:
    """Everything that determines the rows of a store, and their provenance.

    identity: hashes (of the teacher, the tokenizer, the chat template) by name, which must match
    when the store is read. vocabulary: number of tokens in the distributions. provenance: hashes of
    the data and the code, for information only.
    """

    encoding: Encoding
    vocabulary: int
    identity: Mapping[str, str]
    temperature: float = 1.0
    seed: int = 0
    provenance: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        provenance = dict(sorted(self.provenance.items()))
        return {"format": FORMAT, **self._decisive(), "provenance": provenance}

    def _decisive(self) -> dict[str, Any]:
        return {
            "encoding": encoding_to_json(self.encoding),
            "vocabulary": self.vocabulary,
            "temperature": self.temperature,
            "seed": self.seed,
            "identity": dict(sorted(self.identity.items())),
        }

    def fingerprint(self) -> bytes:
        """16 bytes that every shard contains, so that no other store's shard is used by mistake."""
        text = json.dumps(self._decisive(), sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the manifest.

    crc32: of all bytes after its header. xxh3: XXH3 of the file (128 bits, in hex), which is faster
    to compute; None in older manifests.
    """

    name: str
    crc32: int
    bytes: int
    segments: int
    rows: int
    xxh3: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Quality:
    """Means over the rows of a store.

    captured_mass: the teacher's probability of the stored tokens. variance: Σ_i Var(p̂_i) of the
    estimate. squared_bias: Σ_i (E p̂_i − p_i)². entries: stored tokens. bytes: size of all files,
    including keys, offsets, and checksums.
    """

    captured_mass: float
    variance: float
    squared_bias: float
    entries: float
    bytes: float


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished store. `rows` counts supervised tokens."""

    settings: Settings
    quality: Quality
    segments: int
    rows: int
    bytes: int
    shards: tuple[ShardEntry, ...]

    def to_json(self) -> dict[str, Any]:
        encoding = self.settings.encoding
        return {
            **self.settings.to_json(),
            "fingerprint": self.settings.fingerprint().hex(),
            "signal": encoding.signal,
            "serves": encoding.serves,
            "bias": encoding.bias,
            "mean_a_row": asdict(self.quality),
            "segments": self.segments,
            "rows": self.rows,
            "bytes": self.bytes,
            "shards": [asdict(shard) for shard in self.shards],
        }

    def digest(self) -> str:
        """A hash of the store's content, 16 bytes in hex."""
        content = self.to_json()
        for shard in content["shards"]:
            del shard["xxh3"]  # which older manifests lack
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_settings(path: Path) -> Settings:
    """Read a store's settings. Raises StoreError if there is no store or they are damaged."""
    if not (path / SETTINGS).exists():
        raise StoreError(
            "there is no signal store here",
            where=path,
            fix="check the path, or record a store with `stillhouse signals RECIPE`",
        )
    return _settings(read_checked_json(path / SETTINGS, "the store's settings"), path / SETTINGS)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a finished store.

    Raises StoreError if there is no store, or if it is unfinished, damaged, or has a different
    format.
    """
    file = path / MANIFEST
    if not file.exists():
        settings = read_settings(path)
        raise StoreError(
            f"the store ({settings.encoding.kind}) is not finished: it has no manifest",
            where=path,
            fix="run the command that recorded it again, which resumes",
        )
    raw = read_checked_json(file, "the manifest")
    settings = _settings(raw, file)
    try:
        return Manifest(
            settings=settings,
            quality=Quality(**raw["mean_a_row"]),
            segments=raw["segments"],
            rows=raw["rows"],
            bytes=raw["bytes"],
            shards=tuple(ShardEntry(**shard) for shard in raw["shards"]),
        )
    except (LookupError, TypeError) as error:
        raise StoreError(
            f"this is not a manifest in this version's format ({error})",
            where=file,
            fix="restore it from a copy, or delete it and record the store again",
        ) from error


def _settings(raw: Mapping[str, Any], file: Path) -> Settings:
    if raw.get("format") != FORMAT:
        raise StoreError(
            f"the store has format {raw.get('format')}, but this Stillhouse reads format {FORMAT}",
            where=file,
            fix="use the Stillhouse that wrote the store, or record it again",
        )
    names = ("vocabulary", "identity", "temperature", "seed", "provenance")
    encoding = encoding_from_json(raw["encoding"])
    return Settings(encoding, **{name: raw[name] for name in names})


def check_same(stored: Settings, expected: Settings, path: Path) -> None:
    """Raise SignalError if the store was begun with different settings."""
    theirs, ours = _flat(stored), _flat(expected)
    _check({name: ours.get(name) for name in [*ours, *theirs]}, theirs, path)


def check_expected(
    stored: Settings,
    path: Path,
    identity: Mapping[str, str],
    temperature: float | None,
    vocabulary: int | None,
) -> None:
    """Raise SignalError for the first value that differs from the store's."""
    expected: dict[str, Any] = dict(identity)
    if temperature is not None:
        expected["temperature"] = float(temperature)
    if vocabulary is not None:
        expected["vocabulary"] = vocabulary
    _check(expected, _flat(stored), path)


def _flat(settings: Settings) -> dict[str, Any]:
    return {
        **settings.identity,
        "temperature": float(settings.temperature),
        "vocabulary": settings.vocabulary,
        "seed": settings.seed,
        "encoding": encoding_to_json(settings.encoding),
    }


def _check(expected: Mapping[str, Any], theirs: Mapping[str, Any], path: Path) -> None:
    for name, value in expected.items():
        found = theirs.get(name)
        if found != value:
            raise SignalError(
                f"the signal store was recorded with a different {name}: it has {found}, and this "
                f"run has {value}",
                where=path,
                fix=f"use the {name} that the store was recorded with, or record a new store",
            )


# --- files: flushed to disk before they are used, and JSON with a checksum ------------------------


def write_durably(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it.

    Raises StoreError if the disk is full or the folder cannot be written. The temporary file is
    then removed, and any previous file is unchanged.
    """
    try:
        with complete_or_absent(path) as temporary, temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        flush(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                "the disk is full; every shard before this one is kept",
                where=path.parent,
                fix="free some space and run the same command again to resume",
            ) from error
        raise StoreError(
            f"the store cannot be written ({error.strerror})",
            where=path,
            fix="check that the folder exists and is writable",
        ) from error


def write_checked_json(path: Path, content: dict[str, Any]) -> None:
    """Write the content durably as JSON, with a checksum as its last key."""
    write_durably(path, [_checked_text(content)])


def read_checked_json(path: Path, what: str) -> dict[str, Any]:
    """Read a file that `write_checked_json` wrote. Raises StoreError if any byte has changed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{what} cannot be read ({error.strerror})", where=path) from error
    try:
        content = json.loads(data)
        del content["checksum"]
        intact = _checked_text(content) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise StoreError(
            f"{what} is damaged: its checksum does not match",
            where=path,
            fix="restore it from a copy, or delete it and record the store again",
        )
    return content


def _checked_text(content: dict[str, Any]) -> bytes:
    checksum = hashlib.blake2b(_text(content), digest_size=16).hexdigest()
    return _text({**content, "checksum": checksum})


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
