"""The machine that a run is planned for: this one, or one that is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from stillhouse.hardware import (
    Requested,
    choose_precision,
    default_device,
    free_memory_bytes,
    matmul_rate,
)
from stillhouse.launch import processes_here, world_size

EFFICIENCY = 0.55
"""Share of the measured matrix product rate that a training step reaches (bench/step)."""


MICRO_TOKENS = {torch.float32: 256, torch.bfloat16: 1024}
"""Tokens of a CPU's micro-batch by the number type of its products. More of them take more memory
and are not faster; in bfloat16, float32 weights are rounded once for each micro-batch."""


def micro_windows(device: str, context: int, dtype: torch.dtype) -> int | None:
    """The most windows of a default micro-batch; None: no limit. dtype: of the products."""
    return max(1, MICRO_TOKENS[dtype] // context) if device == "cpu" else None


@dataclass(frozen=True)
class Machine:
    """Where a run's processes are: one for each GPU, or so many of a torchrun on CPUs.

    memory: bytes that each may take. rate: FLOP/s that each reaches in training; None: not known.
    price: dollars an hour of each; None: not known.
    """

    device: Literal["cpu", "cuda"]
    memory: float
    per_node: int = 1
    nodes: int = 1
    rate: float | None = None
    price: float | None = None

    @property
    def processes(self) -> int:
        return self.per_node * self.nodes

    def micro_windows(self, context: int, precision: Requested) -> int | None:
        """The function of this name, for this machine."""
        return micro_windows(self.device, context, self.compute(precision))

    def compute(self, precision: Requested) -> torch.dtype:
        """The number type of products: for a GPU that is not here, bfloat16 unless requested."""
        if precision != "auto":
            return torch.float32 if precision == "float32" else torch.bfloat16
        if self.device == "cuda" and not torch.cuda.is_available():
            return torch.bfloat16
        return choose_precision(precision).dtype


def this_machine(precision: Requested, *, timed: bool) -> Machine:
    """The processes of this torchrun, or the one there is. timed: measure how fast it multiplies,
    which takes a second."""
    device, processes, here = default_device(), world_size(), processes_here()
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = free_memory_bytes(device) / here
    rate = None
    if timed:
        rate = EFFICIENCY * matmul_rate(choose_precision(precision, device).dtype, device)
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    return Machine(kind, memory, here, max(1, processes // here), rate)
