"""A Hugging Face folder's tensors, grouped like in GGUF and read on demand."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stillhouse.export.gguf_model import long_factors, rope_factors
from stillhouse.teachers.gguf_families import ROPE_FACTORS
from stillhouse.teachers.weights import weight_files

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>.*)")


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
