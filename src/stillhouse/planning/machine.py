"""The machine that a run is planned for: this one, or a described one."""

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
"""The fraction of the measured matrix-product rate that a training step reaches (bench/step)."""


MICRO_TOKENS = {torch.float32: 256, torch.bfloat16: 1024}
"""Tokens in a CPU's micro-batch by the dtype of its products. More tokens use more memory without
being faster. In bfloat16, float32 weights are rounded once per micro-batch, so it is larger."""


def micro_windows(device: str, context: int, dtype: torch.dtype) -> int | None:
    """Return the maximum windows in a default micro-batch; None for no limit. dtype: the products'
    dtype."""
    return max(1, MICRO_TOKENS[dtype] // context) if device == "cpu" else None


@dataclass(frozen=True)
class Machine:
    """The hardware of a run's processes: one per GPU, or a torchrun's processes on CPUs.

    memory: bytes available to each process. rate: FLOP/s that each process reaches in training;
    None if unknown. price: dollars per hour for each process; None if unknown.
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

    def compute(self, precision: Requested) -> torch.dtype:
        """Return the products' dtype; for a GPU that is not present, bfloat16 by default."""
        if precision != "auto":
            return torch.float32 if precision == "float32" else torch.bfloat16
        if self.device == "cuda" and not torch.cuda.is_available():
            return torch.bfloat16
        return choose_precision(precision).dtype


def this_machine(precision: Requested, *, timed: bool) -> Machine:
    """Describe the machine of this torchrun's processes, or of this process. timed: measure the
    matrix-product rate, which takes about a second."""
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
