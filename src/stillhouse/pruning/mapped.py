"""Weights that stay on disk: a large model is cut without ever being in memory as a whole.

A safetensors file is mapped, so its pages come into memory when a layer is used. Here they are let
go again behind it, and a layer that was cut is written to a file and mapped in its turn. What is in
memory at a time is then a layer or two, or an end of the model, and the calibration rows.

This is for CPUs and Linux; elsewhere, and for models below LARGE_BYTES, nothing is done.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from stillhouse.hardware import hand_back_freed_memory
from stillhouse.teachers.load import load_config, load_model
from stillhouse.teachers.views import decoder_layers

LARGE_BYTES = 2 << 30
"""Weights in float32 from which on they are left on disk."""
MAPS = Path("/proc/self/smaps")
_MADV_DONTNEED = 4  # <sys/mman.h> of Linux

Range = tuple[int, int]


def is_large(model: Any) -> bool:
    """Whether the weights of a model on the CPU are to be left on disk."""
    if sys.platform != "linux" or model.device.type != "cpu":
        return False
    return 4 * sum(parameter.numel() for parameter in model.parameters()) >= LARGE_BYTES


def load_on_disk(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The model in float32. A large one stays in its files; stored in another number type, each
    layer and each of its ends is converted in a file of its own, which takes its float32 size in
    the temporary folder. The allocator is then set to hand back what is freed.

    Raises ModelError as `load_model` does.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    stored = getattr(config, "dtype", None) or torch.float32
    model = load_model(path, dtype=stored, trust_remote_code=trust_remote_code)
    if not is_large(model):
        return model.float()
    hand_back_freed_memory()
    if stored == torch.float32:
        return model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    # One after the other: a large vocabulary's embeddings are as large as some layers.
    for module in (*decoder_layers(model), embedding, *([] if tied else [head])):
        move_to_disk(module)
    if tied:
        head.weight = embedding.weight
    model.float()
    model.config.dtype = torch.float32
    return model


def move_to_disk(module: nn.Module) -> None:
    """Writes a module's parameters to a file, in float32, and maps them in their place.

    The file has no name any more once it is mapped, and goes with the last tensor.
    """
    before = mapped_ranges(module)
    named = dict(module.named_parameters())
    with tempfile.TemporaryDirectory(prefix="stillhouse-weights-") as folder:
        file = Path(folder) / "weights.safetensors"
        copies = {name: value.detach().float().contiguous() for name, value in named.items()}
        save_file(copies, file)
        del copies
        mapped = load_file(file)
    for name, old in named.items():
        place, _, last = name.rpartition(".")
        owner = module.get_submodule(place)
        setattr(owner, last, nn.Parameter(mapped[name], requires_grad=old.requires_grad))
    del named
    let_go(before)
    let_go(mapped_ranges(module))
    _trim()


def mapped_ranges(module: nn.Module) -> list[Range]:
    """Addresses of the module's parameters that are pages of a file, and unchanged ones."""
    files = _file_maps()
    found = []
    for parameter in module.parameters():
        start = parameter.data_ptr()
        stop = start + parameter.numel() * parameter.element_size()
        if any(low <= start and stop <= high for low, high in files):
            found.append((start, stop))
    return found


def let_go(ranges: list[Range]) -> None:
    """Takes whole pages out of this process's memory; the next use reads them from the file.

    Where a file is mapped no more, the address may be other memory by now, which must stay.
    """
    files = _file_maps()
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    for start, stop in ranges:
        first, last = -(-start // page) * page, stop // page * page
        if first < last and any(low <= first and last <= high for low, high in files):
            libc.madvise(first, last - first, _MADV_DONTNEED)


def let_go_of_ends(model: Any) -> None:
    """Takes the embeddings and the head out of memory."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        let_go(mapped_ranges(module))


def _leave(layer: nn.Module) -> None:
    """Lets go of a layer that has run, and of what its activations took."""
    let_go(mapped_ranges(layer))
    _trim()


def _trim() -> None:
    """Gives freed memory back to the system, where the C library keeps it and can (glibc).

    It keeps what lies between blocks in use, as the rows that are kept of each layer are.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def let_go_after_use(model: Any) -> Iterator[None]:
    """While the block lasts, each layer of a large model leaves memory as soon as it has run; its
    ends do after it."""
    if not is_large(model):
        yield
        return
    handles = [
        layer.register_forward_hook(lambda module, *_: _leave(module))
        for layer in decoder_layers(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        let_go_of_ends(model)


def save_model(model: Any, folder: Path) -> None:
    """Writes a checkpoint as `save_pretrained` does; a large model's a layer at a time, one file
    for each and one for its ends, so that no more than a layer is in memory for it."""
    if not is_large(model):
        model.save_pretrained(folder)
        return
    weights = model.state_dict()
    parts = _parts(model, weights)
    index: dict[str, str] = {}
    total = 0
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part_folder:
        for number, (part, names) in enumerate(parts, 1):
            part_file = Path(part_folder) / SAFE_WEIGHTS_NAME
            state = {name: weights[name] for name in names}
            # It knows which weights are tied, and the names and shapes they have in a file.
            model.save_pretrained(part_folder, state_dict=state, max_shard_size="1TB")
            let_go(mapped_ranges(part))
            name = f"model-{number:05}-of-{len(parts):05}.safetensors"
            with safe_open(part_file, "pt") as saved:
                index |= dict.fromkeys(saved.keys(), name)
            total += part_file.stat().st_size
            part_file.rename(folder / name)
        for other in Path(part_folder).iterdir():
            other.rename(folder / other.name)
    described = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(described, indent=2))


def _parts(model: Any, names: Collection[str]) -> list[tuple[nn.Module, list[str]]]:
    """Each layer with the names of its weights, and the rest of the model."""
    layers = {id(layer): layer for layer in decoder_layers(model)}
    places = {name: layers[id(m)] for name, m in model.named_modules() if id(m) in layers}
    found = [
        (layer, [name for name in names if name.startswith(f"{place}.")])
        for place, layer in places.items()
    ]
    inside = {name for _, own in found for name in own}
    return [*found, (model, [name for name in names if name not in inside])]


def _file_maps() -> list[Range]:
    """Address ranges of this process that are files, none of whose pages was written to.

    A page that was written to is the process's own, and to let it go would lose what was written.
    """
    found: list[Range] = []
    candidate: Range | None = None
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        name, *values = line.split(maxsplit=5)
        if not name.endswith(":"):
            low, high = name.split("-")
            candidate = (int(low, 16), int(high, 16)) if values[3] != "0" else None
        elif name == "Anonymous:" and values[0] == "0" and candidate is not None:
            found.append(candidate)
    return found
