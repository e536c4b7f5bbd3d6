"""Write a GGUF file from a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from torch import Tensor

from stillhouse.export.export_formats import GGUF
from stillhouse.export.gguf_config import add_configuration
from stillhouse.export.gguf_model import family, gguf_names, long_factors, rope_factors
from stillhouse.export.gguf_tokenizer import add_tokenizer
from stillhouse.teachers.gguf_families import ROPE_FACTORS, to_file
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.weights import weight_files

EMBEDDINGS = ("token_embd.weight", "output.weight")
ROUTER = "ffn_gate_inp.weight"
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>.*)")
FALLBACK = Kind.F16
"""Type of matrices whose rows do not divide into the format's blocks, as in llama.cpp's
converter."""


@dataclass(frozen=True)
class GGUFFormat:
    """A GGUF format. kind: type of matrices. embeddings: type of the embeddings and the head, which
    are more sensitive."""

    kind: Kind
    file_type: gguf.LlamaFileType
    kl_limit: float
    embeddings: Kind

    @property
    def block(self) -> int:
        return int(gguf.GGML_QUANT_SIZES[self.kind][0])


def _format(name: str, kl_limit: float) -> GGUFFormat:
    kind = Kind[name.upper()]
    file_type = {Kind.F32: "ALL_F32", Kind.MXFP4: "MOSTLY_MXFP4_MOE"}.get(
        kind, f"MOSTLY_{name.upper()}"
    )
    block, size = gguf.GGML_QUANT_SIZES[kind]
    embeddings = kind if size >= block else Kind.Q8_0  # At least 8 bits per number.
    return GGUFFormat(kind, gguf.LlamaFileType[file_type], kl_limit, embeddings)


FORMATS = {name: _format(name, kl_limit) for name, kl_limit in GGUF.items()}

Packed = tuple[Kind, npt.NDArray[np.uint8]]


def write_gguf(
    source: AnyModel,
    file: Path,
    form: GGUFFormat,
    *,
    name: str,
    packed: Mapping[str, Packed] | None = None,
) -> list[str]:
    """Write `file`; vectors stay float32. Return the names of tensors that fell back to float16.

    packed: tensors whose blocks are ready, by their Hugging Face names, with rows in the model's
        order.

    Raises ModelError if the writer does not support the architecture or the tokenizer.
    """
    config, tokenizer = load_config(source).get_text_config(), load_tokenizer(source)
    architecture = family(config)
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_name(name)
    writer.add_file_type(form.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_configuration(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    with ExitStack() as stack:
        tensors = open_tensors(source_of(source).path, config, stack)
        names = gguf_names(tensors, config)
        kinds, fallen = {}, []
        for key, there in names.items():
            shape = tensors[key].shape
            kinds[key] = packed[key][0] if packed and key in packed else kind_of(there, shape, form)
            if len(shape) > 1 and kinds[key] is FALLBACK and form.kind is not FALLBACK:
                fallen.append(key)
            block, size = gguf.GGML_QUANT_SIZES[kinds[key]]
            nbytes = int(np.prod(shape)) // block * size
            # Any dtype but uint8, for which the shape would be that of the blocks' bytes.
            writer.add_tensor_info(there, shape, np.dtype(np.float32), nbytes, kinds[key])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key in names:
            if packed and key in packed:
                data = to_file(architecture, key, packed[key][1], config)
            else:
                tensor = tensors[key].read().to(torch.float32).numpy()
                data = gguf.quantize(to_file(architecture, key, tensor, config), kinds[key])
            writer.write_tensor_data(np.ascontiguousarray(data))
        writer.close()
    return fallen


def kind_of(there: str, shape: list[int], form: GGUFFormat) -> Kind:
    """A tensor's type: float32 for vectors and routers, which are small and decide between experts;
    float16 if rows do not divide into blocks."""
    if len(shape) == 1 or there.endswith(ROUTER):
        return Kind.F32
    kind = form.embeddings if there in EMBEDDINGS else form.kind
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else FALLBACK


@dataclass(frozen=True)
class Source:
    """A tensor's shape, and how to read it."""

    shape: list[int]
    read: Callable[[], Tensor]


def open_tensors(source: Path, config: Any, stack: ExitStack) -> dict[str, Source]:
    """Open the tensors, by name. The files stay open as long as the stack."""
    opened: dict[str, Source] = {}
    for file in weight_files(source):
        tensors = stack.enter_context(safe_open(file, framework="pt"))
        for name in tensors.keys():  # noqa: SIM118
            shape = tensors.get_slice(name).get_shape()
            opened[name] = Source(shape, partial(tensors.get_tensor, name))
    if config.tie_word_embeddings:
        opened.pop("lm_head.weight", None)
    factors, same = long_factors(config), rope_factors(config)
    if same is not None:
        factors[ROPE_FACTORS] = same
    for name, divisors in factors.items():
        opened[name] = Source(list(divisors.shape), partial(torch.from_numpy, divisors))
    return _stack_experts(opened)


def _stack_experts(opened: dict[str, Source]) -> dict[str, Source]:
    """Stack each matrix over all experts into a tensor [E, rows, columns], in the experts'
    order."""
    found: dict[str, Source] = {}
    parts: dict[str, dict[int, Source]] = {}
    for name, tensor in opened.items():
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            found[name] = tensor
        else:
            stacked = f"{expert['experts']}.{expert['part']}"
            parts.setdefault(stacked, {})[int(expert["number"])] = tensor
    for stacked, experts in parts.items():
        ordered = [experts[number] for number in sorted(experts)]
        found[stacked] = Source([len(ordered), *ordered[0].shape], partial(_stack, ordered))
    return found


def _stack(tensors: list[Source]) -> Tensor:
    return torch.stack([tensor.read() for tensor in tensors])
