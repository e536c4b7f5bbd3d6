"""Frozen weights as memory-mapped files, whose pages are released between uses.

Pages that were read count as resident memory, although the file has the same bytes. After they are
released, the next use maps them again from the system's page cache. Only mappings created here are
released, and only if their tensors were not written to, so no weight loses its values.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes by their names in safetensors headers."""

Span = tuple[mmap.mmap, int, int]
"""A private mapping of a file, and the first byte of a part of it and the one after its last."""


@dataclass(frozen=True)
class MappedWeights:
    """Parameters that are views of mapped files.

    spans: their bytes, in complete pages. versions: the parameters, each with the version counter
    that it had when it was mapped.
    """

    spans: tuple[Span, ...]
    versions: tuple[tuple[Tensor, int], ...]

    def release(self) -> None:
        """Release the pages, unless a parameter was changed in place."""
        if all(weight._version == version for weight, version in self.versions):
            _release(self.spans)


def map_weights(
    model: Any, layers: Iterable[nn.Module], files: Iterable[Path]
) -> dict[nn.Module, MappedWeights]:
    """Make the model's parameters views of its safetensors files, and return them by layer.

    All parameters are replaced, since transformers maps a file as one storage, which lasts as long
    as any of its tensors. A parameter stays as it is if it is not on the CPU, or if its name,
    dtype, or values differ from the file; so do all parameters on systems that cannot release
    pages.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return {}
    stored = {name: (span, tensor) for file in files for name, span, tensor in _stored(file)}
    mapped: dict[Tensor, Span] = {}
    for name, parameter in model.named_parameters():
        if name in stored and _is_equal(parameter, stored[name][1]):
            mapped[parameter], parameter.data = stored[name]
            _release(_page_spans([mapped[parameter]]))  # or the model would be in memory twice
    found = {}
    for layer in layers:
        own = [parameter for parameter in layer.parameters() if parameter in mapped]
        spans = tuple(_page_spans([mapped[parameter] for parameter in own]))
        if spans:
            found[layer] = MappedWeights(spans, tuple((each, each._version) for each in own))
    return found


def _stored(path: Path) -> Iterator[tuple[str, Span, Tensor]]:
    """A file's tensors, as views of one mapping. The file is an 8-byte length, a JSON header, and
    the values (https://github.com/huggingface/safetensors#format)."""
    with path.open("rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    first = 8 + int.from_bytes(file[:8], "little")
    for name, entry in json.loads(file[8:first]).items():
        dtype = _DTYPES.get(entry.get("dtype"))
        if name == "__metadata__" or dtype is None or not all(entry["shape"]):
            continue
        start, end = (first + offset for offset in entry["data_offsets"])
        if start % dtype.itemsize:
            continue
        tensor = torch.frombuffer(file, dtype=dtype, count=math.prod(entry["shape"]), offset=start)
        yield name, (file, start, end), tensor.view(entry["shape"])


def _is_equal(parameter: Tensor, tensor: Tensor) -> bool:
    return (
        parameter.device.type == "cpu"
        and parameter.dtype == tensor.dtype
        and torch.equal(parameter, tensor)
    )


def _release(spans: Iterable[Span]) -> None:
    for file, start, end in spans:
        file.madvise(mmap.MADV_DONTNEED, start, end - start)


def _page_spans(spans: Iterable[Span]) -> Iterator[Span]:
    """The complete pages in spans, of which neighbors are joined."""
    joined: list[Span] = []
    for file, start, end in sorted(spans, key=lambda span: (id(span[0]), span[1])):
        if joined and joined[-1][0] is file and joined[-1][2] == start:
            start = joined.pop()[1]
        joined.append((file, start, end))
    for file, start, end in joined:
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            yield file, start, end
