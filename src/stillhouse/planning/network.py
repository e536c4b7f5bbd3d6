"""The network traffic of each process in an optimizer step.

Collectives are counted as rings: an all-gather or reduce-scatter of S bytes over n processes makes
each of them send S·(n − 1)/n, and an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.planning.machine import Machine
from stillhouse.planning.step_memory import WIDE, Shard, Step


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends. between_nodes: the part that goes to another node, for the
    process that sends the most."""

    all: float
    between_nodes: float


def step_traffic(
    step: Step, shard: Shard, *, over: int, machine: Machine, micro_batches: int
) -> Traffic:
    """Compute an optimizer step's traffic.

    over: the number of processes that a model is sharded over. micro_batches: the number per
    process. Sharded weights are gathered for every micro-batch's forward and backward pass, and
    their gradients are reduced after each; the gradients of replicas are reduced once.
    """
    processes, size = machine.processes, step.student.size.parameters
    trained = WIDE * step.student.trained
    shared = copied = 0.0
    if shard in ("student", "both"):
        shared += micro_batches * _ring(2 * step.gathered * size + trained, over)
        copied += 2 * _ring(trained / over, processes // over)
    else:
        copied += 2 * _ring(trained, processes)
    if shard in ("teacher", "both"):
        shared += micro_batches * _ring(step.compute * step.teacher_parameters, over)
    crossing = 0.0
    if machine.nodes > 1:
        # A ring over all nodes crosses to the next node with everything that it sends.
        crossing = copied + (shared if over > machine.per_node else 0.0)
    return Traffic(shared + copied, crossing)


def _ring(size: float, processes: int) -> float:
    return size * (processes - 1) / processes
