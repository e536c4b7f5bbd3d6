"""Weights of a sharded model, of which each process reads its own part from a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from stillhouse.hardware import default_device
from stillhouse.launch import leads
from stillhouse.processes import first_row, local_part
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.weights import tensor_names, weight_files
from stillhouse.training.sharded_checkpoint import send_weights


@torch.no_grad()
def read_weights(
    root: nn.Module, model: nn.Module, folder: Path, *, trust_remote_code: bool = False
) -> None:
    """Set the weights of a sharded model from a model folder, in the number type of the model.

    root: the sharded module, which contains the model. Weights on the meta device get memory.
    Each process reads its own rows. Where the folder's names are not those of the model (mixtures
    of experts with a file entry for each expert), the main process loads everything, and sends to
    each process its part. Every process must call this. Raises ModelError: damaged files.
    """
    device = default_device()
    root._apply(lambda each: torch.empty_like(each, device=device) if each.is_meta else each)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    stored = model.state_dict().keys()
    weights |= {name: each for name, each in model.named_buffers() if name in stored}
    files = {name: file for file in weight_files(folder) for name in tensor_names(file)}
    if not weights.keys() <= files.keys():
        found: dict[str, Tensor] = {}
        if leads():
            dtype = next(model.parameters()).dtype
            loaded = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
            found = loaded.state_dict()
        send_weights(model, found)
        return
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in weights:
        by_file[files[name]].append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                _read(weights[name], tensors.get_slice(name))


def _read(weight: Tensor, stored: Any) -> None:
    """stored: a slice of a safetensors file; rows beyond those of the weight are left out."""
    own = local_part(weight)
    if not own.numel():
        return
    start = first_row(weight)
    own.copy_(stored[start : start + len(own)] if own.dim() else stored[...])
