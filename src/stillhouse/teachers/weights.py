"""Checks of a Hugging Face model folder before anything is loaded from it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stillhouse.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WHOLE_NUMBERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Dtypes of tensors that cannot be used as weights without scales."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, after checking their headers and sizes.

    Raises ModelError: no config.json, no safetensors weights, a missing shard, or a damaged file.
    """
    check_config(folder)
    if (folder / SINGLE).is_file():
        _reject_other_weights(folder)
        tensor_names(folder / SINGLE)
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    what = "this folder has a config.json but no safetensors weights"
    fix = f"copy {SINGLE}, or {INDEX} and its shards, to the folder"
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        what = f"the weights are pickled ({pickled[0].name}), and a pickle can run any code"
        fix = (
            "if you trust them, convert them to safetensors with AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(new_folder), and copy the tokenizer's files "
            "there too"
        )
    raise ModelError(what, where=folder, fix=fix)


def _reject_other_weights(folder: Path) -> None:
    """Raise ModelError for shards alongside a file with all weights, since programs differ in which
    of them they read."""
    index = folder / INDEX
    found = read_json(index).get("weight_map") if index.is_file() else None
    names = set(map(str, found.values())) if isinstance(found, dict) else set()
    others = sorted(name for name in names - {SINGLE} if os.path.isfile(folder / name))
    if others:
        raise ModelError(
            f"the folder contains a model's weights twice: in {SINGLE}, and in {len(others)} "
            f"shards ({others[0]}, ...) with an index",
            where=folder,
            fix=f"move either {SINGLE}, or the shards and {INDEX}, to another folder",
        )


def tensor_names(file: Path) -> set[str]:
    """The tensors' names in a safetensors file. Reads only the header, and checks the file's size
    against it."""
    with file.open("rb") as opened:
        if opened.read(20).startswith(b"version https://git-"):
            raise ModelError(
                "this file is a Git LFS pointer, not weights",
                where=file,
                fix="run `git lfs pull` in that folder",
            )
    try:
        with safe_open(file, framework="pt") as opened_tensors:
            return set(opened_tensors.keys())
    except SafetensorError as error:
        raise ModelError(
            f"this safetensors file is damaged or truncated ({error})",
            where=file,
            fix="download or copy it again",
        ) from error


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes of a checkpoint's tensors. Raises ModelError as `weight_files` does."""
    return set(stored_types(weight_files(folder)).values())


def stored_types(files: Iterable[Path]) -> dict[str, str]:
    """The dtype of each tensor, by its name in safetensors headers (F32, BF16)."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found[name] = str(tensors.get_slice(name).get_dtype())
    return found


def read_tensors(files: Iterable[Path], names: Collection[str]) -> dict[str, Any]:
    """Read those of the named tensors that the files contain."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in set(tensors.keys()) & set(names):
                found[name] = tensors.get_tensor(name)
    return found


def read_json(file: Path) -> dict[str, object]:
    """Read one JSON object from a model folder. Raises ModelError if it is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"this file cannot be read as JSON ({error})",
            where=file,
            fix="download or copy the model again",
        ) from error
    if not isinstance(value, dict):
        raise ModelError("this file is not a JSON object", where=file, fix="copy the model again")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. Raises ValueError for a repeated key with different values."""
    found: dict[str, object] = {}
    for key, value in pairs:
        first = found.setdefault(key, value)
        if first is not value and first != value:  # NaN differs from itself
            raise ValueError(f"the key {key!r} is given twice, with different values")
    return found


def check_config(folder: Path) -> None:
    """Raise ModelError if a folder has no readable config.json, or contains an adapter."""
    adapter = (folder / "adapter_config.json").is_file()
    if (folder / "config.json").is_file():
        read_json(folder / "config.json")
        if adapter:
            raise ModelError(
                "this folder contains an adapter in addition to the model, and it is not clear "
                "whether it is merged into the weights",
                where=folder,
                fix="merge it into the model (peft: merge_and_unload, then save_pretrained); or, "
                "if it is already merged or not needed, move adapter_config.json elsewhere",
            )
        return
    what = "this folder is not a Hugging Face model: it has no config.json"
    fix = "give the folder that save_pretrained wrote"
    if adapter:
        what = "this folder contains an adapter, not a model"
        fix = (
            "merge it into its base model (peft: merge_and_unload, then save_pretrained), and "
            "copy the tokenizer's files to the same folder"
        )
    elif ggufs := sorted(folder.glob("*.gguf")):
        what = "this folder has no config.json, only GGUF files"
        fix = f"give the file itself: {ggufs[0]}"
    raise ModelError(what, where=folder, fix=fix)


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index has no weight_map", where=index, fix="copy the model again")
    if not isinstance(content.get("metadata"), dict):
        raise ModelError(
            "the index has no metadata, which transformers needs",
            where=index,
            fix='copy the model again, or add "metadata": {} to the index',
        )
    places = sorted(set(map(str, weight_map.values())))
    missing = [place for place in places if not os.path.isfile(index.parent / place)]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(places)} weight files are missing: {', '.join(missing[:3])}",
            where=index.parent,
            fix="download or copy them too",
        )
    held = {place: tensor_names(index.parent / place) for place in places}
    mixed = "download or copy the model again: its files are from different versions"
    lacking = [name for name, place in weight_map.items() if name not in held[str(place)]]
    if lacking:
        what = f"the index lists {len(lacking)} tensors that are not in the files, such as"
        where = index.parent / str(weight_map[lacking[0]])
        raise ModelError(f"{what} {lacking[0]}", where=where, fix=mixed)
    for place, names in held.items():
        for name in sorted(names & set(weight_map)):
            if weight_map[name] != place:
                what = f"the tensor {name} is in two files: {place} and {weight_map[name]}"
                raise ModelError(what, where=index.parent, fix=mixed)
    return [index.parent / place for place in places]
