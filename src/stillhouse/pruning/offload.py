"""Offload weights to disk, so that a large model can be pruned without ever being completely in
memory.

Each parameter of an offloaded module is a memory-mapped scratch file. Since the mapping is shared,
it is read and written like any other tensor, and writes go to the file. A page is in memory from
its first use on. To release the pages, the file is mapped again, and PyTorch unmaps the old pages
along with the last tensor that uses them, so a live tensor never loses its values. A file lasts as
long as its parameter.

At any time, memory holds the calibration rows and either one or two layers, or the embeddings and
the head. Models smaller than LARGE_BYTES stay in memory. When processes under torchrun prune the
same model, they share a file for each layer until they cut that layer (`shared_layers`).
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.hardware import hand_back_freed_memory
from stillhouse.launch import local_index, process_index
from stillhouse.scratch import scratch_place, temporary_disk
from stillhouse.shared_work import Processes
from stillhouse.teachers.activations import decoder_layers
from stillhouse.teachers.load_model import load_config, load_model
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.write_by_layer import weights_by_layer, write_by_layer

LARGE_BYTES = 2 << 30
"""Models whose float32 weights have at least this many bytes are offloaded."""
BLOCK = 1 << 20
"""Number of values converted at a time while a parameter is written."""


def is_large(model: Any) -> bool:
    """Whether the model is on the CPU and too large to be completely in memory."""
    return model.device.type == "cpu" and has_large_weights(model)


def has_large_weights(model: Any) -> bool:
    return 4 * sum(parameter.numel() for parameter in model.parameters()) >= LARGE_BYTES


def load_offloaded(checkpoint: AnyModel) -> Any:
    """Load the model in float32, offloaded if it is large.

    Offloading needs as much space in the temporary folder as the model's float32 weights. Within
    `shared_layers`, layers are mapped from the shared files instead.

    Raises ModelError like `load_model`.
    """
    model, path = _load(checkpoint), source_of(checkpoint).path
    if is_large(model):
        if path in _shared:
            for weight, file in zip(_layer_weights(model), _shared[path], strict=True):
                _map(weight, file)
        offload(model)
    return model.float()


def _load(checkpoint: AnyModel) -> Any:
    """Load the model in the dtype of its files, so that they can be memory-mapped."""
    stored = getattr(load_config(checkpoint), "dtype", None) or torch.float32
    return load_model(checkpoint, dtype=stored)


_shared: dict[Path, list[str]] = {}
"""For each model folder, the files with its layers' weights, which other processes map too."""


@contextmanager
def shared_layers(checkpoint: AnyModel, processes: Processes) -> Iterator[None]:
    """Within the context, all processes on a machine share one file per layer weight of a large
    model, however often they load it. Call `take_own` before changing a layer.

    Every process must call this. Raises ModelError like `load_model`.
    """
    if processes.count == 1:
        yield
        return
    path, written = source_of(checkpoint).path, list[str]()
    if local_index() == 0:
        model = _load(checkpoint)
        if is_large(model):
            written = [_file_with(weight) for weight in _layer_weights(model)]
        del model
    if files := processes.collect(written)[process_index() - local_index()]:
        _shared[path] = files
    try:
        yield
    finally:
        _shared.pop(path, None)
        for file in written:
            _remove(file)


def _layer_weights(model: Any) -> list[nn.Parameter]:
    return [weight for layer in decoder_layers(model) for weight in layer.parameters()]


def take_own(module: nn.Module) -> None:
    """Copy a module's weights to memory if other processes share their files. Before that, writing
    to them would change them for all processes."""
    shared = {file for files in _shared.values() for file in files}
    for parameter in module.parameters():
        if _file_of(parameter) in shared:
            parameter.data = parameter.data.clone()


def offload(module: nn.Module) -> None:
    """Move a module's CPU parameters to disk, in float32, and release those that are already there.

    From then on, the allocator returns freed memory to the system.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu":
            _map(parameter, _file_of(parameter) or _written(parameter))
    hand_back_freed_memory()


def is_offloaded(module: nn.Module) -> bool:
    """Whether any of the module's parameters is on disk."""
    return any(_file_of(parameter) is not None for parameter in module.parameters())


def release(module: nn.Module) -> None:
    """Release a module's offloaded parameters from memory; their next use reads them from disk."""
    for parameter in module.parameters():
        file = _file_of(parameter)
        if file is not None:
            _map(parameter, file)


def release_ends(model: Any) -> None:
    """Release the embeddings and the head from memory."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        release(module)


@contextmanager
def released_after_use(model: Any) -> Iterator[None]:
    """Within the context, release each layer of an offloaded model as soon as it has run; release
    the embeddings and the head at the end."""
    if not is_offloaded(model):
        yield
        return

    with ExitStack() as stack:
        stack.callback(release_ends, model)
        for layer in decoder_layers(model):
            stack.enter_context(layer.register_forward_hook(lambda layer, *_: release(layer)))
        yield


def save_model(model: Any, folder: Path) -> None:
    """Write a checkpoint like `save_pretrained`. A large model is written layer by layer, one file
    per layer and one for the rest, so that at most one layer is in memory."""
    # Under torchrun, `save_pretrained` only writes in the main process, but other processes can
    # have a different model to save.
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        if is_large(model):
            write_by_layer(model, folder, _layer_after_layer(model))
        else:
            model.save_pretrained(folder)
    finally:
        del model.should_save_on_this_rank


def _layer_after_layer(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of each part of the model; release a part when the next one is needed."""
    for part, names in weights_by_layer(model):
        yield {name: value for name, value in model.state_dict().items() if name in names}
        release(part)


def _file_of(tensor: Tensor) -> str | None:
    """The file that a tensor is mapped from; None if it is in memory or on an accelerator."""
    return tensor.untyped_storage().filename if tensor.device.type == "cpu" else None


def _written(parameter: Tensor) -> str:
    """Write the parameter's values, in float32, to a file that is deleted with the parameter."""
    file = _file_with(parameter)
    weakref.finalize(parameter, _remove, file)
    return file


def _file_with(parameter: Tensor) -> str:
    """Write the parameter's values, in float32, to a new file."""
    place = scratch_place()
    with temporary_disk(place):
        handle, file = tempfile.mkstemp(prefix="stillhouse-weights-", dir=place)
        with os.fdopen(handle, "wb") as opened:
            for block in parameter.detach().reshape(-1).split(BLOCK):
                block.float().numpy().tofile(opened)
    return file


def _map(parameter: Tensor, file: str) -> None:
    # If the file was deleted, mapping it would create it anew, all zeros: keep the old mapping.
    if os.path.exists(file):
        values = torch.from_file(file, shared=True, size=parameter.numel(), dtype=torch.float32)
        parameter.data = values.view(parameter.shape)


def _remove(file: str) -> None:
    with suppress(OSError):  # Windows cannot delete a file that is still mapped.
        os.remove(file)
