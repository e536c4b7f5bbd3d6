"""Terminal table of a search's candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from stillhouse.pruning.shapes import shown
from stillhouse.pruning.sizes import AXES, Sizes
from stillhouse.search.shape_costs import Costs

if TYPE_CHECKING:
    from stillhouse.search.search_shape import Candidate

HEADS = {"ffn_size": "FFN", "kv_heads": "KV heads", "hidden_size": "hidden"}
"""Column headings of axes with long names."""
ROWS = 12
"""Number of shapes shown; candidates.json lists all of them."""


def candidates_table(
    before: Sizes, found: Sequence[Candidate], chosen: Candidate, costs: Costs
) -> Table:
    """Tabulate the chosen shape and then those that got furthest, with their measurements."""
    rounds = max((len(one.trained_kl) for one in found), default=0)
    table = Table(title="Shapes", show_edge=False)
    axes = [axis for axis in AXES if getattr(before, axis) is not None]
    for axis in axes:
        table.add_column(HEADS.get(axis, axis), justify="right")
    heads = [costs.limit.key.replace("_", " "), "KL by axes", "KL one-shot"]
    for head in [*heads, *(f"KL round {number}" for number in range(1, rounds + 1))]:
        table.add_column(head, justify="right")
    for one in sorted(found, key=lambda one: _order(one, chosen))[:ROWS]:
        trained = [_number(kl) for kl in one.trained_kl]
        table.add_row(
            *(_size(before, one.sizes, axis) for axis in axes),
            shown(costs.limit.key, one.cost),
            _number(one.expected),
            _number(one.one_shot_kl),
            *trained,
            *[""] * (rounds - len(trained)),
            style="bold" if one is chosen else None,
        )
    return table


def _order(one: Candidate, chosen: Candidate) -> tuple[float, ...]:
    trained = one.trained_kl[-1] if one.trained_kl else 0.0
    measures = [float("inf") if kl is None else kl for kl in (one.one_shot_kl, one.expected)]
    return (one is not chosen, -len(one.trained_kl), trained, *measures)


def _size(before: Sizes, sizes: Sizes, axis: str) -> Text:
    """A size, dimmed if it is not cut."""
    value = getattr(sizes, axis)
    return Text(str(value), "dim" if value == getattr(before, axis) else "")


def _number(kl: float | None) -> str:
    return "" if kl is None or kl == float("inf") else f"{kl:.3f}"
