"""What one stage of a run is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.planning.machine import Machine
from stillhouse.planning.step_memory import Memory


@dataclass(frozen=True)
class StageEstimate:
    """memory: of each process that works. processes: how many do. tokens: that it computes. flops:
    of all processes; None: not known. disk: bytes that it leaves. scratch: bytes on disk while it
    runs, in addition. network: bytes that each process sends to others. between_nodes: the part of
    it that leaves the node. note: what else there is to know. fix: the cheapest change of the
    recipe with which it fits, where it does not.
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
        """Of computing alone; None where that is not known."""
        if self.flops is None or machine.rate is None:
            return None
        return self.flops / (machine.rate * self.processes)

    def dollars(self, machine: Machine) -> float | None:
        """All processes are paid for while some work."""
        seconds = self.seconds(machine)
        if seconds is None or machine.price is None:
            return None
        return seconds / 3600 * machine.price * machine.processes
