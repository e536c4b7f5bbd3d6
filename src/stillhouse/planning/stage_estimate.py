"""The expected requirements of one stage."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.planning.machine import Machine
from stillhouse.planning.step_memory import Memory


@dataclass(frozen=True)
class StageEstimate:
    """What a stage is expected to take.

    memory: per working process. processes: the number that work. tokens: the number processed.
    flops: over all processes; None if unknown. disk: bytes left on disk. scratch: additional bytes
    on disk while it runs. network: bytes that each process sends to others. between_nodes: the part
    of `network` that leaves the node. note: anything else to know. fix: if the stage does not fit,
    the cheapest change to the recipe that makes it fit.
    """

    name: str
    memory: Memory
    processes: int = 1
    tokens: int = 0
    flops: float | None = None
    disk: float = 0.0
    scratch: float = 0.0
    network: float = 0.0
    between_nodes: float = 0.0
    note: str = ""
    fix: str | None = None

    def seconds(self, machine: Machine) -> float | None:
        """Seconds of computing alone; None if unknown."""
        if self.flops is None or machine.rate is None:
            return None
        return self.flops / (machine.rate * self.processes)

    def dollars(self, machine: Machine) -> float | None:
        """The stage's cost. All processes are paid for, even if only some of them work."""
        seconds = self.seconds(machine)
        if seconds is None or machine.price is None:
            return None
        return seconds / 3600 * machine.price * machine.processes
