"""The tensors of a Hugging Face folder as GGUF divides them, each read when it is asked for."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stillhouse.export.gguf_model import ROPE_FACTORS, rope_factors
from stillhouse.teachers.weights import weight_files

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>.*)")


@dataclass(frozen=True)
class Stacked:
    """One matrix of every expert as a tensor [E, rows, columns]; `parts`: the file of each."""

    parts: dict[str, Any]

    def get_slice(self, _name: str) -> Stacked:
        return self

    def get_shape(self) -> list[int]:
        name, file = next(iter(self.parts.items()))
        return [len(self.parts), *file.get_slice(name).get_shape()]

    def get_tensor(self, _name: str) -> Tensor:
        return torch.stack([file.get_tensor(name) for name, file in self.parts.items()])


@dataclass(frozen=True)
class Derived:
    """A tensor that only the GGUF file has."""

    tensor: Tensor

    def get_slice(self, _name: str) -> Derived:
        return self

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_tensor(self, _name: str) -> Tensor:
        return self.tensor


def open_tensors(source: Path, config: Any, stack: ExitStack) -> dict[str, Any]:
    """By name, what has the tensor: get_slice(name).get_shape() and get_tensor(name), as the files
    of safetensors do, which stay open as long as the stack.
    """
    opened: dict[str, Any] = {}
    for file in weight_files(source):
        tensors = stack.enter_context(safe_open(file, framework="pt"))
        opened |= dict.fromkeys(tensors.keys(), tensors)
    if config.tie_word_embeddings:
        opened.pop("lm_head.weight", None)
    factors = rope_factors(config)
    if factors is not None:
        opened[ROPE_FACTORS] = Derived(torch.from_numpy(factors))
    return _stack_experts(opened)


def _stack_experts(opened: dict[str, Any]) -> dict[str, Any]:
    """Tensors of single experts become one, in the experts' order."""
    found: dict[str, Any] = {}
    parts: dict[str, dict[int, str]] = {}
    for name, file in opened.items():
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            found[name] = file
        else:
            stacked = f"{expert['experts']}.{expert['part']}"
            parts.setdefault(stacked, {})[int(expert["number"])] = name
    for stacked, names in parts.items():
        ordered = [names[number] for number in sorted(names)]
        found[stacked] = Stacked({name: opened[name] for name in ordered})
    return found
