"""Writing of a model's checkpoint part by part, so that it is never completely in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from stillhouse.teachers.activations import decoder_layers

SHARD_BYTES = 2 << 30


def weights_by_layer(model: Any) -> list[tuple[nn.Module, set[str]]]:
    """Each layer with the names of its weights, then the model with the names of all others."""
    names = set(model.state_dict().keys())
    layers = {id(layer): layer for layer in decoder_layers(model)}
    places = {name: layers[id(m)] for name, m in model.named_modules() if id(m) in layers}
    found = [
        (layer, {name for name in names if name.startswith(f"{place}.")})
        for place, layer in places.items()
    ]
    return [*found, (model, names.difference(*(own for _, own in found)))]


def write_by_layer(model: Any, folder: Path, weights: Iterable[dict[str, Tensor]]) -> None:
    """Write the files that `save_pretrained` writes, with one weight file for each part.

    weights: the weights of each part of `weights_by_layer`, in the same order. One part is in
    memory at a time. Weights already in the folder, from a killed attempt or a different model, are
    replaced.
    """
    index: dict[str, str] = {}
    number, total, count = 0, 0, len(weights_by_layer(model))
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part_folder:
        for part in weights:  # enumerate would keep a part while the next one is built
            number += 1
            # save_pretrained resolves tied weights, and their names and shapes in a file.
            model.save_pretrained(part_folder, state_dict=part, max_shard_size="1TB")
            del part
            part_file = Path(part_folder) / SAFE_WEIGHTS_NAME
            name = f"model-{number:05}-of-{count:05}.safetensors"
            with safe_open(part_file, "pt") as saved:
                index |= dict.fromkeys(saved.keys(), name)
            total += part_file.stat().st_size
            part_file.rename(folder / name)
        for other in Path(part_folder).iterdir():
            other.rename(folder / other.name)
    written = {folder / name for name in index.values()}
    for former in set(folder.glob("model*.safetensors")) - written:
        former.unlink()
    _write_index(index, total, folder)


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write named tensors to one file, or to several files of about SHARD_BYTES with an index.

    Only one file's tensors are in memory at a time.
    """
    shards: list[list[str]] = []
    total, left = 0, iter(tensors)
    while shard := dict(_up_to_bytes(left, SHARD_BYTES)):
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()  # before the next one is built
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else SAFE_WEIGHTS_NAME
        index |= dict.fromkeys(names, name)
        (folder / f"part-{number}").rename(folder / name)
    if len(shards) > 1:
        _write_index(index, total, folder)


def _up_to_bytes(left: Iterator[tuple[str, Tensor]], most: int) -> Iterator[tuple[str, Tensor]]:
    size = 0
    while size < most and (one := next(left, None)) is not None:
        size += one[1].nbytes
        yield one


def _write_index(index: dict[str, str], total: int, folder: Path) -> None:
    described = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(described, indent=2))
