"""Measure the cost of cutting each axis alone, and estimate the cost of shapes that cut several.

A shape's expected cost is the sum of its axes' separate costs. Each axis is pruned and measured at
a few sizes, and the cost is interpolated in between. This ranks hundreds of shapes for the price of
a handful. Interactions between axes only show when the best candidates are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from stillhouse.pruning.sizes import Sizes

MOST = {"ffn_size": 3, "attention": 4, "hidden_size": 2, "experts": 2}
"""Maximum number of sizes to measure per axis. Depth is missing here: see `choose_layers`."""


@dataclass(frozen=True)
class Curve:
    """Cost in nats/token as a function of an axis's remaining share.

    points: (share, cost) pairs, by ascending share; the cost of share 1 is 0.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, share: float) -> float:
        return 0.0 if share >= 1 or not self.points else interpolated(self.points, share)


def interpolated(points: Sequence[tuple[float, float]], place: float) -> float:
    """Interpolate linearly between ascending points; extrapolate the outermost segments."""
    if len(points) == 1:
        return points[0][1]
    reaching = (pair for pair in pairwise(points) if place <= pair[1][0])
    (left, low), (right, high) = next(reaching, points[-2:])
    return low + (high - low) * (place - left) / (right - left)


def share(before: Sizes, shape: Sizes, axis: str) -> float:
    """The remaining share of an axis in a shape. Attention counts query heads and key-value heads
    equally."""
    if axis == "attention":
        return (shape.heads + shape.kv_heads) / (before.heads + before.kv_heads)
    if axis == "experts" and before.experts is None:
        return 1.0
    left: float = getattr(shape, axis) / getattr(before, axis)
    return left


def only(before: Sizes, shape: Sizes, axis: str) -> Sizes:
    """The start model's sizes, with only one axis cut as in `shape`."""
    if axis == "attention":
        return replace(before, heads=shape.heads, kv_heads=shape.kv_heads)
    return replace(before, **{axis: getattr(shape, axis)})


def probed(
    before: Sizes, shapes: Sequence[Sizes], possible: Callable[[Sizes], bool]
) -> dict[str, list[Sizes]]:
    """The shapes to measure for each axis: the smallest and the largest cut that occur in `shapes`,
    and some in between.

    possible: returns whether the architecture allows a shape. A hidden size that is not allowed
        with all heads is replaced by the next smaller one that is. Head counts that are not allowed
        are left out, and interpolated from their neighbors.
    """
    found = {}
    for axis, limit in MOST.items():
        alone = [only(before, shape, axis) for shape in shapes]
        if axis == "hidden_size":
            alone = [_narrower(shape, possible) for shape in alone]
        cut = {shape for shape in alone if possible(shape)} - {before}
        ordered = sorted(cut, key=lambda shape: share(before, shape, axis))
        most = min(limit, len(ordered))
        places = {round(i * (len(ordered) - 1) / max(1, most - 1)) for i in range(most)}
        found[axis] = [ordered[place] for place in sorted(places)]
    return found


def _narrower(shape: Sizes, possible: Callable[[Sizes], bool]) -> Sizes:
    """The shape with the widest possible hidden size up to its own."""
    sizes = range(shape.hidden_size, 0, -1)
    narrower = (replace(shape, hidden_size=size) for size in sizes)
    return next(filter(possible, narrower), shape)


def curves(
    before: Sizes, probes: Mapping[str, Sequence[Sizes]], measure: Callable[[Sizes], float]
) -> dict[str, Curve]:
    """Measure each axis's probes. measure: returns a shape's cost in nats/token."""
    found = {}
    for axis, shapes in probes.items():
        points = [(share(before, shape, axis), measure(shape)) for shape in shapes]
        found[axis] = Curve((*sorted(points), (1.0, 0.0)))
    return found


def expected(
    before: Sizes, shape: Sizes, known: Mapping[str, Curve], depth: Mapping[int, float]
) -> float:
    """The sum of the separate costs of a shape's cuts, in nats/token; infinite if its depth was not
    measured because shallower cuts already cost too much.

    depth: cost by number of remaining layers.

    An axis that could not be probed is assumed to cost as much as the most expensive of the others
    when cut equally far.
    """
    layers = 0.0 if shape.layers == before.layers else depth.get(shape.layers, float("inf"))
    return layers + sum(_alone(known, axis, share(before, shape, axis)) for axis in known)


def _alone(known: Mapping[str, Curve], axis: str, left: float) -> float:
    if len(known[axis].points) > 1:
        return known[axis].at(left)
    return max(curve.at(left) for curve in known.values())
