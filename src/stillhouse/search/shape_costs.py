"""The costs of shapes in the target's unit, counted or measured on this machine."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stillhouse.progress import note
from stillhouse.pruning.pruning_config import SearchRecipe, TargetRecipe
from stillhouse.pruning.shapes import (
    LEAST_FFN_SHARE,
    Cost,
    Counter,
    Limit,
    counted,
    limit_of,
    possible_shapes,
)
from stillhouse.search.block_timing import (
    LatencyTable,
    MemoryLine,
    Timing,
    measure_memory,
    shapes_to_time,
    time_shape,
    timed_widths,
)
from stillhouse.search.trial_log import Journal


@dataclass(frozen=True)
class Costs:
    """of: returns a shape's cost. measured: the measurements that costs are computed from, as plain
    data."""

    of: Cost
    limit: Limit
    measured: Any = None


def costs_of(
    config: Any,
    counter: Counter,
    search: SearchRecipe,
    target: TargetRecipe,
    served: torch.dtype,
    device: torch.device,
    journal: Journal,
) -> Costs:
    """The costs of shapes, measured if the target requires it. served: dtype of the exported
    weights."""
    measured: Any = None
    if target.key == "decode_latency":
        measured = _timings(config, counter, search, served, device, journal)
        table = LatencyTable(tuple(Timing(**row) for row in measured))
        cost: Cost = functools.cache(table.seconds)
    elif target.key == "memory":
        if "memory" not in journal and journal.processes.leads:
            note("measuring peak memory for two sizes of this architecture")
        measured = journal.once("memory", lambda: asdict(measure_memory(config, served, device)))
        line = MemoryLine(**measured)

        def cost(sizes: Any) -> float:
            return line.bytes(counter.total(sizes) * served.itemsize)
    else:
        cost = counted(counter, target.key, served.itemsize)
    return Costs(cost, limit_of(target, cost(counter.start), search.tolerance), measured)


def _timings(
    config: Any,
    counter: Counter,
    search: SearchRecipe,
    served: torch.dtype,
    device: torch.device,
    journal: Journal,
) -> list[dict[str, Any]]:
    # Percentages are relative to the start model's time, even if it does not divide among the GPUs.
    start = counter.start
    least = int(start.ffn_size * LEAST_FFN_SHARE) if "ffn_size" in search.axes else start.ffn_size
    shapes = shapes_to_time(
        [start, *possible_shapes(config, search)], timed_widths(start.ffn_size, max(1, least))
    )
    rows = []
    for number, shape in enumerate(shapes, 1):
        name = f"timing {shape.hidden_size} {shape.heads} {shape.kv_heads} {shape.ffn_size}"
        if name not in journal and journal.processes.leads:
            note(f"timing shape {number} of {len(shapes)}")
        rows.append(
            journal.once(name, lambda: asdict(time_shape(config, shape, served, device)))  # noqa: B023
        )
    return rows
