"""The shapes that a model can be pruned to, what each one costs, and which of them meet a target.

A shape is a `Sizes`, the same for every layer. The start model determines the possible
combinations: fewer layers, key-value heads, query heads per key-value head, and experts, and a
narrower stream, each with the widest aligned FFN that still meets the target.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from stillhouse.account import count_parameters
from stillhouse.errors import RecipeError
from stillhouse.pruning.axes import axes_of
from stillhouse.pruning.pruning_config import SearchRecipe, TargetRecipe
from stillhouse.pruning.sizes import AXES, Sizes, resized_config, sizes_of

ALIGNMENTS = (256, 128, 64, 32)
"""Multiples that kernels and GGUF's block formats require, best first."""
LEAST_SHARE = 0.5
"""Minimum fraction of layers, heads, experts, and hidden size that a search keeps: training does
not recover from larger cuts in one step (docs/pruning.md)."""
LEAST_FFN_SHARE = 0.25
HIDDEN_SIZES = 5
"""Maximum number of hidden sizes to try."""
EXPERT_STEPS = 16
"""Experts are removed in sixteenths, so that they still divide evenly among 2, 4, or 8 GPUs if they
did before."""

Cost = Callable[[Sizes], float]


class Counter:
    """Exact parameter counts for all shapes of a model, from a few models on the meta device.

    Parameter counts are linear in the number of layers, the number of experts, and the FFN width,
    so a few models with one or two layers and experts determine the counts of all shapes with the
    same heads and hidden size.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.start = sizes_of(config)
        self._lines = lru_cache(maxsize=None)(self._measure)

    def total(self, sizes: Sizes) -> int:
        return self._count(sizes, 0)

    def non_embedding(self, sizes: Sizes) -> int:
        return self._count(sizes, 1)

    def _count(self, sizes: Sizes, which: int) -> int:
        one = replace(sizes, layers=1, ffn_size=1, experts=sizes.experts and 1)
        ends, layer, expert, neuron = self._lines(one)[which]
        return ends + sizes.layers * (
            layer + (sizes.experts or 1) * (expert + sizes.ffn_size * neuron)
        )

    def _measure(self, one: Sizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Parameter counts of the embeddings and head, a layer without its FFN, an expert without
        its neurons (0 for a plain FFN), and a neuron: first all parameters, then only non-embedding
        parameters."""
        layers = min(2, self.start.layers)
        shapes = [
            one,
            replace(one, ffn_size=2),
            replace(one, experts=one.experts and 2),
            replace(one, layers=layers),
        ]
        counts = []
        for shape in shapes:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(resized_config(self.config, shape))
            found = count_parameters(model)
            counts.append((found.total, found.non_embedding))
        lines = []
        for smallest, wider, richer, deeper in zip(*counts, strict=True):
            neuron = wider - smallest
            expert = richer - smallest - neuron if one.experts else 0
            layer = deeper - smallest if layers > 1 else smallest
            lines.append((smallest - layer, layer - expert - neuron, expert, neuron))
        return lines[0], lines[1]


@dataclass(frozen=True)
class Limit:
    """The most and the least that a shape can cost, and the start model's cost, in the target's
    unit."""

    key: str
    most: float
    least: float
    unpruned: float

    def __str__(self) -> str:
        return f"{shown(self.key, self.most)} ({self.most / self.unpruned:.0%} of the model)"

    def nearest(self, before: Sizes, shape: Sizes, cost: float) -> str:
        share = f"{math.ceil(100 * cost / self.unpruned)}%"
        least = shown(self.key, _rounded_up(cost))
        return f"nearest: {least} ({share}) with {described(before, shape)}"


def _rounded_up(value: float) -> float:
    """The value with at most four digits, so that a target that is set to it allows the value."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(round(value / step, 6)) * step


def shown(key: str, value: float) -> str:
    """A cost in recipe syntax."""
    if key == "decode_latency":
        return f"{value * 1e3:.4g}ms"
    units = ("B", "M", "k") if "params" in key else ("GB", "MB", "kB")
    for step, unit in zip((1e9, 1e6, 1e3), units, strict=True):
        if value >= step:
            return f"{value / step:.4g}{unit}"
    return f"{value:.0f}"


def limit_of(target: TargetRecipe, unpruned: float, tolerance: float) -> Limit:
    amount = target.amount
    most = amount.value * unpruned if amount.relative else amount.value
    return Limit(target.key, most, most * (1 - tolerance), unpruned)


def sizes_to_prune(before: Sizes, after: Sizes) -> dict[str, Any]:
    """The sizes that differ, as keyword arguments of `prune_model`."""
    cut = {key for key in AXES if getattr(after, key) != getattr(before, key)}
    if cut & {"heads", "kv_heads"}:  # One of them would not determine the other.
        cut |= {"heads", "kv_heads"}
    return {key: getattr(after, key) for key in AXES if key in cut}


def feasible_shapes(config: Any, search: SearchRecipe, cost: Cost, limit: Limit) -> list[Sizes]:
    """All shapes that cost between limit.least and limit.most, those with the fewest cuts first.

    Raises RecipeError, naming the nearest possible shape, if the target is not smaller than the
    model, too small for the axes, or between two aligned shapes. Also raises the errors of
    `possible_shapes`.
    """
    before = sizes_of(config)
    possible = possible_shapes(config, search)
    if limit.most >= limit.unpruned:
        raise _no_shape(before, possible, [], search, cost, limit)
    found: list[Sizes] = []
    below: list[Sizes] = []
    for shape in possible:
        fitting = [
            next((s for s in _widths(shape, search, step) if cost(s) <= limit.most), None)
            for step in _steps(search)
        ]
        inside = [s for s in fitting if s is not None and cost(s) >= limit.least and s != before]
        found += inside[:1]
        below += [s for s in fitting if s is not None]
    if not found:
        raise _no_shape(before, possible, below, search, cost, limit)
    return sorted(found, key=lambda s: (len(sizes_to_prune(before, s)), -cost(s)))


def planned_shape(
    config: Any, search: SearchRecipe, target: TargetRecipe, *, width: int, certain: bool = True
) -> Sizes:
    """The student's approximate sizes before a search: the shape with the fewest cuts.

    Costs that must be measured on this machine are assumed to be proportional to the number of
    parameters. If the target is then out of reach, or is an absolute amount, the model's own sizes
    are returned.

    width: bytes per parameter.
    certain: False if the search will prune a different model.

    Raises the errors of `feasible_shapes`, unless the cost has to be measured or the model is
    uncertain.
    """
    counter = Counter(config)
    cost = counted(counter, target.key, width)
    possible_shapes(config, search)
    if target.measured and not target.amount.relative:
        return counter.start
    limit = limit_of(target, cost(counter.start), search.tolerance)
    try:
        return feasible_shapes(config, search, cost, limit)[0]
    except RecipeError:
        if certain and not target.measured:
            raise
        return counter.start


def counted(counter: Counter, key: str, width: int) -> Cost:
    """A shape's cost, computed instead of measured. width: bytes per parameter."""
    if key == "non_embedding_params":
        return counter.non_embedding
    factor = width if key in ("bytes", "memory") else 1
    return lambda sizes: float(counter.total(sizes) * factor)


def possible_shapes(config: Any, search: SearchRecipe) -> list[Sizes]:
    """All combinations of the axes except FFN width for which some FFN width is possible.

    Raises RecipeError if no shape divides evenly among `search.tensor_parallel` GPUs.
    """

    def having_a_width(search: SearchRecipe) -> Iterator[Sizes]:
        for shape in combinations(config, search):
            if next(_all_widths(shape, search), None) is not None:
                yield shape

    found = list(having_a_width(search))
    if not found:
        among = search.tensor_parallel
        fewer = range(min(among - 1, sizes_of(config).heads), 0, -1)
        narrower = (search.model_copy(update={"tensor_parallel": gpus}) for gpus in fewer)
        largest = next((s for s in narrower if next(having_a_width(s), None) is not None), None)
        fewer_gpus = (
            [] if largest is None else [f"use at most tensor_parallel: {largest.tensor_parallel}"]
        )
        raise RecipeError(
            f"with the axes {', '.join(search.axes)}, no shape's heads and FFN divide evenly among "
            f"{among} GPUs",
            where="student.search.tensor_parallel",
            fix=" or ".join(fewer_gpus + _more_axes(search)),
        )
    return found


def combinations(config: Any, search: SearchRecipe) -> Iterator[Sizes]:
    """All combinations of the axes except FFN width, which stays the same."""
    before, rules = sizes_of(config), axes_of(config)

    def down(axis: str, size: int) -> list[int]:
        return list(range(size, -(-size // 2) - 1, -1)) if axis in search.axes else [size]

    # Without grouped-query attention (share 1), a head is removed with its keys and values.
    by_head = before.share == 1 and "heads" in search.axes
    groups = down("heads" if by_head else "kv_heads", before.kv_heads)
    shares = down("heads", before.share)
    hidden = _hidden_sizes(before.hidden_size, search)
    for size, kv_heads, each, experts, layers in itertools.product(
        hidden, groups, shares, _expert_counts(config, search), down("layers", before.layers)
    ):
        heads, parallel = kv_heads * each, search.tensor_parallel
        if size % heads and rules.hidden_over_heads:
            continue
        if heads % parallel or (kv_heads % parallel and parallel % kv_heads):
            continue
        grouped = replace(before, hidden_size=size, heads=heads, kv_heads=kv_heads)
        yield replace(grouped, layers=layers, experts=experts)


def _hidden_sizes(size: int, search: SearchRecipe) -> list[int]:
    if "hidden_size" not in search.axes:
        return [size]
    least = size * LEAST_SHARE
    steps = _steps(search)
    step = next((step for step in steps if size - 3 * step >= least), steps[-1])
    below = [value for value in range(step, size, step) if value >= least]
    return [size, *below[::-1][:HIDDEN_SIZES]]


def _expert_counts(config: Any, search: SearchRecipe) -> list[int | None]:
    total = sizes_of(config).experts
    if total is None or "experts" not in search.axes:
        return [total]
    least = max(config.num_experts_per_tok, math.ceil(total * LEAST_SHARE))
    return list(range(total, least - 1, -max(1, total // EXPERT_STEPS)))


def _widths(shape: Sizes, search: SearchRecipe, step: int) -> Iterator[Sizes]:
    """The shape with its current FFN width and with every smaller aligned one, widest first."""
    if shape.ffn_size % search.tensor_parallel == 0:
        yield shape
    if "ffn_size" in search.axes:
        step = math.lcm(step, search.tensor_parallel)
        widest = (shape.ffn_size - 1) // step * step
        for size in range(widest, 0, -step):
            if size >= shape.ffn_size * LEAST_FFN_SHARE:
                yield replace(shape, ffn_size=size)


def _steps(search: SearchRecipe) -> Sequence[int]:
    return ALIGNMENTS if search.multiple_of is None else (search.multiple_of,)


def _more_axes(search: SearchRecipe) -> list[str]:
    """The advice to search along more axes; empty if the search uses all of them."""
    return [] if {*AXES} <= {*search.axes} else ["add axes to student.search.axes"]


def described(before: Sizes, shape: Sizes) -> str:
    """The sizes that differ, in recipe syntax."""
    found = sizes_to_prune(before, shape)
    return ", ".join(f"{key}: {value}" for key, value in found.items()) or "the model itself"


def _no_shape(
    before: Sizes,
    possible: list[Sizes],
    below: list[Sizes],
    search: SearchRecipe,
    cost: Cost,
    limit: Limit,
) -> RecipeError:
    """The error if no shape meets the target. below: shapes that cost too little."""
    where = f"student.target.{limit.key}"
    if below:
        nearest = max(below, key=cost)
        gap = 1 - cost(nearest) / limit.most
        return RecipeError(
            f"no aligned shape is at most {search.tolerance:.2%} below the target {limit}",
            where=where,
            fix=f"set student.search.tolerance to {gap + 0.01:.2f}, or lower multiple_of; nearest: "
            f"{shown(limit.key, cost(nearest))} with {described(before, nearest)}",
        )
    axes, every = ", ".join(search.axes), [s for one in possible for s in _all_widths(one, search)]
    other_shapes = " or ".join([*_more_axes(search), "set a lower student.search.multiple_of"])
    if limit.most >= limit.unpruned:
        smaller = [s for s in every if s != before and cost(s) < limit.unpruned]
        nearest = max(smaller, key=cost, default=before)
        own = shown(limit.key, limit.unpruned)
        return RecipeError(
            f"the target {limit} is not smaller than the model, {own}",
            where=where,
            fix=limit.nearest(before, nearest, cost(nearest)) if smaller else other_shapes,
        )
    smallest = min(every, key=cost)
    if smallest == before:
        return RecipeError(
            f"the axes {axes} allow no smaller shape, but the target is {limit}",
            where="student.search.axes",
            fix=other_shapes,
        )
    return RecipeError(
        f"the target {limit} is smaller than the axes {axes} allow in one step",
        where=where,
        fix=f"{limit.nearest(before, smallest, cost(smallest))}; to get smaller, prune in several "
        "hops (docs/cascade.md)",
    )


def _all_widths(shape: Sizes, search: SearchRecipe) -> Iterator[Sizes]:
    for step in _steps(search):
        yield from _widths(shape, search, step)
