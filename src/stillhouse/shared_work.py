"""Work that a torchrun's processes divide, with results that do not depend on their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from stillhouse.launch import process_index, world_size
from stillhouse.processes import open_group, patient_group

T = TypeVar("T")
Empty = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Processes:
    """The processes that divide some work. All of them must call the same methods in the same
    order.

    own: this process's rank. count: the number of processes.
    """

    own: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.own == 0

    def part(self, items: int) -> range:
        """Return this process's contiguous part of so many items; all parts have the same size or
        differ by one."""
        return range(items * self.own // self.count, items * (self.own + 1) // self.count)

    def owner(self, item: int, items: int) -> int:
        """Return the rank of the process whose part contains an item."""
        return ((item + 1) * self.count - 1) // items

    def in_turn(self, items: Sequence[T]) -> Sequence[T]:
        """Return every n-th item, for n processes, starting at this process's rank."""
        return items[self.own :: self.count]

    def collect(self, value: T) -> list[T]:
        """Gather every process's value, in order of rank."""
        found: list[T] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value, group=patient_group())
        return found

    def from_main(self, value: T) -> T:
        """Broadcast the main process's value."""
        found = [value]
        if self.count > 1:
            dist.broadcast_object_list(found, src=0, group=patient_group())
        return found[0]

    def from_owner(
        self, owner: int, work: Callable[[], Sequence[Tensor]], empty: Empty
    ) -> list[Tensor]:
        """Run `work` in the process `owner` only, and broadcast the tensors that it returns.

        empty: returns tensors of the same shapes, dtypes, and device to receive them in.
        """
        own = self.own == owner
        found = [tensor.contiguous() for tensor in (work() if own else empty())]
        if self.count > 1:
            for tensor in found:
                dist.broadcast(tensor, owner, group=_group_for(tensor))
        return found

    def sum(self, terms: Iterable[Sequence[Tensor]], items: int, empty: Empty) -> list[Tensor]:
        """Sum one term per item; the result is bitwise identical for any number of processes.

        Adjacent terms are added in pairs, then the sums of pairs, and so on, so the order of the
        additions depends only on `items`. About log2(items) terms are in memory at once.
        terms: the terms of this process's part, in order, computed lazily; their tensors are
        overwritten. empty: as in `from_owner`, for one term.
        """
        size = 1 << (items - 1).bit_length()  # the next power of two
        total = self._node(0, size, iter(terms), items, empty)
        return self.from_owner(self.owner(0, items), lambda: total or [], empty)

    def _node(
        self, first: int, size: int, own: Iterator[Sequence[Tensor]], items: int, empty: Empty
    ) -> list[Tensor] | None:
        """Return the sum of `size` items in the process that owns the first of them; None in the
        others."""
        owner = self.owner(first, items)
        if size == 1:
            return list(next(own)) if owner == self.own else None
        half = size // 2
        left = self._node(first, half, own, items, empty)
        if first + half >= items:
            return left
        right = self._node(first + half, half, own, items, empty)
        other = self.owner(first + half, items)
        if other != owner and right is not None:
            for tensor in right:
                dist.send(tensor.contiguous(), owner, group=_group_for(tensor))
        if left is None:
            return None
        if right is None:
            right = list(empty())
            for tensor in right:
                dist.recv(tensor, other, group=_group_for(tensor))
        for tensor, more in zip(left, right, strict=True):
            tensor += more
        return left


def _group_for(tensor: Tensor) -> Any:
    """Choose a group for a tensor. On a CPU, another process may take long to solve for a large
    layer's weights, so waiting must not time out."""
    return patient_group() if tensor.device.type == "cpu" else None


ALONE = Processes()


def all_processes() -> Processes:
    """Return all processes of this torchrun. Every process must call this."""
    open_group()
    return Processes(process_index(), world_size())
