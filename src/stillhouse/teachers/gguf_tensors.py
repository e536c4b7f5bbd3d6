"""A GGUF file's tensors under the names of a transformers checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from stillhouse.teachers.gguf_families import (
    ARCHITECTURES,
    LLAMA,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    from_file,
)
from stillhouse.teachers.gguf_keys import UnreadableGGUFError

IN_THE_CONFIGURATION = {ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS}
_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def read_tensors(reader: gguf.GGUFReader, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the model in float32, with its name in a checkpoint.

    Raises UnreadableGGUFError: a tensor that the model does not have, or one that is missing, has
    the wrong shape, or contains values that are not finite.
    """
    there = ARCHITECTURES[config.model_type]
    if reader.fields["general.architecture"].contents() == LLAMA.name:
        there = LLAMA
    known = gguf.get_tensor_name_map(there.arch, config.num_hidden_layers)
    left = {tensor.name: tensor for tensor in reader.tensors}
    shapes = _shapes(config)
    found = {
        name: left.pop(known.get_name(name, try_suffixes=(".weight", ".bias")), None)
        for name in shapes
    }
    surplus = sorted(left.keys() - IN_THE_CONFIGURATION)
    if surplus:
        raise UnreadableGGUFError(f"it has tensors that are not part of the model: {_few(surplus)}")
    missing = [name for name, stored in found.items() if stored is None]
    if missing:
        raise UnreadableGGUFError(
            f"{len(missing)} of {len(shapes)} tensors are missing: {_few(missing)}"
        )
    for name, stored in found.items():
        data = from_file(there, name, _numbers(stored), config)
        if list(data.shape) != shapes[name]:
            raise UnreadableGGUFError(
                f"the tensor {stored.name} has shape {list(data.shape)}, not {shapes[name]}"
            )
        if not np.isfinite(data).all():
            raise UnreadableGGUFError(f"the tensor {stored.name} contains NaN or infinity")
        yield from _apart(name, torch.from_numpy(np.array(data, dtype=np.float32))).items()


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shapes(config: Any) -> dict[str, list[int]]:
    """Shapes of the checkpoint's tensors, but with a layer's experts stacked, as in the file."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        experts = _EXPERTS.fullmatch(name)
        if experts is None:
            found[name] = list(tensor.shape)
            continue
        parts = ["gate_proj", "up_proj"] if experts[2] == "gate_up_proj" else ["down_proj"]
        number, rows, columns = tensor.shape
        for part in parts:
            found[f"{experts[1]}.{part}.weight"] = [number, rows // len(parts), columns]
    return found


def _numbers(stored: Any) -> Any:
    try:
        return gguf.dequantize(stored.data, stored.tensor_type)
    except NotImplementedError as error:
        kind = gguf.GGMLQuantizationType(stored.tensor_type).name
        raise UnreadableGGUFError(
            f"the tensor {stored.name} has the unsupported type {kind}"
        ) from error


def _apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split stacked experts into one tensor each, as in checkpoints."""
    prefix, _, part = name.rpartition(".experts.")
    if not prefix:
        return {name: tensor}
    return {f"{prefix}.experts.{n}.{part}": each.clone() for n, each in enumerate(tensor)}
