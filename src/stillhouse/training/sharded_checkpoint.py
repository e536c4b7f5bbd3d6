"""Weights and optimizer state of sharded training, saved and loaded by every process.

torch.distributed.checkpoint writes each process's shard, and can read it into any other partition,
including a single process. A checkpoint of unsharded training can be loaded into sharded training
too, and so can a model folder, of which each process reads its own shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stillhouse.hardware import default_device
from stillhouse.launch import leads
from stillhouse.processes import first_row, local_part
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.weights import tensor_names, weight_files

SHARDED = "sharded"
"""The folder in a checkpoint that contains the shards."""


def is_sharded(checkpoint: Path) -> bool:
    return (checkpoint / SHARDED).is_dir()


def save_parts(checkpoint: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Write this process's shard of the weights and of the optimizer state."""
    state = {
        "model": get_model_state_dict(module),
        "optimizer": get_optimizer_state_dict(module, optimizer),
    }
    with _failures_raised():
        state_dict_saver.save(state, checkpoint_id=checkpoint / SHARDED)


def load_weights(checkpoint: Path, module: nn.Module) -> None:
    """Load the weights that `save_parts` wrote."""
    state = {"model": get_model_state_dict(module)}
    _load(state, checkpoint)
    set_model_state_dict(module, state["model"])


def load_optimizer(checkpoint: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Load the optimizer state that `save_parts` wrote."""
    state = {"optimizer": get_optimizer_state_dict(module, optimizer)}
    _load(state, checkpoint)
    set_optimizer_state_dict(module, optimizer, state["optimizer"])


def _load(state: dict[str, Any], checkpoint: Path) -> None:
    alone = not dist.is_initialized()
    with _failures_raised():
        state_dict_loader.load(state, checkpoint_id=checkpoint / SHARDED, no_dist=alone)


@contextmanager
def _failures_raised() -> Iterator[None]:
    """Raise the first failure of any process on all processes, instead of torch's
    CheckpointException, which is not an Exception."""
    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from None


def gathered_weights(
    model: nn.Module, parts: Iterable[Collection[str]]
) -> Iterator[dict[str, Tensor]]:
    """Yield the complete weights of each part of a sharded model, by name, on the main process's
    CPU. Other processes get empty dictionaries.

    parts: names of weights, which are gathered when their part is needed. Tied weights have only
    their first name. Every process must iterate over all parts.
    """
    first = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    stored = get_model_state_dict(model)
    for names in parts:
        found = {}
        for name in sorted(set(names) - again):
            value: Any = stored[name]
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if leads():
                found[name] = value.cpu()
        yield found


def distribute_weights(
    module: nn.Module, weights: dict[str, Tensor], *, from_main: bool = False
) -> None:
    """Set the weights of a sharded module from complete weights, which every process has, or only
    the main process (`from_main`)."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_main, strict=False)
    set_model_state_dict(module, {**weights}, options=options)


def distribute_optimizer(file: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Set the state of a sharded module's optimizer from the file of an unsharded optimizer.

    file: of `optimizer.state_dict()`, in which parameters are numbered in the optimizer's order.
    """
    stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    names = {parameter: name for name, parameter in module.named_parameters()}
    state: dict[str, Any] = {}
    groups = []
    for group, saved in zip(optimizer.param_groups, stored["param_groups"], strict=True):
        own = [names[parameter] for parameter in group["params"]]
        numbers = saved["params"]
        for name, number in zip(own, numbers, strict=True):
            if number in stored["state"]:
                state[name] = stored["state"][number]
        groups.append({**saved, "params": own})
    complete: Any = {"state": state, "param_groups": groups}
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(module, optimizer, complete, options=options)


@torch.no_grad()
def read_weights(root: nn.Module, model: nn.Module, checkpoint: AnyModel) -> None:
    """Set the weights of a sharded model from a model folder, in the model's dtype.

    root: the sharded module that contains the model. Weights on the meta device get memory.
    Each process reads its own rows. If the folder's names differ from the model's (mixtures of
    experts with a tensor for each expert), the main process loads everything and sends each process
    its shard. Every process must call this. Raises ModelError: damaged files.
    """
    source, device = source_of(checkpoint), default_device()
    root._apply(lambda each: torch.empty_like(each, device=device) if each.is_meta else each)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    stored = model.state_dict().keys()
    weights |= {name: each for name, each in model.named_buffers() if name in stored}
    files = {name: file for file in weight_files(source.path) for name in tensor_names(file)}
    if not weights.keys() <= files.keys():
        found: dict[str, Tensor] = {}
        if leads():
            found = load_model(source, dtype=next(model.parameters()).dtype).state_dict()
        distribute_weights(model, found, from_main=True)
        return
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in weights:
        by_file[files[name]].append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                _read(weights[name], tensors.get_slice(name))


def _read(weight: Tensor, stored: Any) -> None:
    """Read this process's rows. stored: a safetensors slice, which can have more rows than
    needed."""
    own = local_part(weight)
    if not own.numel():
        return
    start = first_row(weight)
    own.copy_(stored[start : start + len(own)] if own.dim() else stored[...])
