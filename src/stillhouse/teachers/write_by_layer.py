"""Write a model's checkpoint one layer at a time, so that never more than a layer is in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from stillhouse.teachers.activations import decoder_layers


def weights_by_layer(model: Any) -> list[tuple[nn.Module, set[str]]]:
    """Each layer with the names of its weights, and at last the model with all others."""
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

    weights: those of each part of `weights_by_layer`, in its order; one part is in memory at a
    time. Files of an earlier attempt that was killed are replaced.
    """
    index: dict[str, str] = {}
    number, total, count = 0, 0, len(weights_by_layer(model))
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part_folder:
        for part in weights:  # enumerate would keep it while the next one is made
            number += 1
            # It resolves tied weights, and the names and shapes that weights have in a file.
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
    described = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(described, indent=2))
