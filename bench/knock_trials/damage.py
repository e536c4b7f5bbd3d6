"""Kinds of damage that disks and incomplete copies cause."""

from __future__ import annotations

import random
from collections.abc import Callable

PAGE = 4096


def flip(chance: random.Random, data: bytearray) -> bytearray:
    for _ in range(chance.choice([1, 1, 2, 30])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def cut(chance: random.Random, data: bytearray) -> bytearray:
    return data[: chance.choice([0, len(data) - 1, chance.randrange(len(data))])]


def swap(chance: random.Random, data: bytearray) -> bytearray:
    """Exchange two blocks of equal size."""
    size = max(1, min(PAGE, len(data) // 4))
    one, other = (chance.randrange(len(data) - size + 1) for _ in range(2))
    first, second = bytes(data[one : one + size]), bytes(data[other : other + size])
    data[one : one + size], data[other : other + size] = second, first
    return data


def zero(chance: random.Random, data: bytearray) -> bytearray:
    start = chance.randrange(len(data)) // PAGE * PAGE
    end = min(start + PAGE, len(data))
    data[start:end] = bytes(end - start)
    return data


def lengthen(chance: random.Random, data: bytearray) -> bytearray:
    return data + chance.choice([b"\0", b"\n", b"}", chance.randbytes(PAGE)])


def repeat_line(chance: random.Random, data: bytearray) -> bytearray:
    """Repeat or remove a line."""
    lines = bytes(data).splitlines(keepends=True)
    at = chance.randrange(len(lines))
    lines[at : at + 1] = [lines[at]] * chance.choice([0, 2])
    return bytearray(b"".join(lines))


Damage = Callable[[random.Random, bytearray], bytearray]
KINDS: tuple[Damage, ...] = (flip, flip, cut, swap, zero, lengthen, repeat_line)


def damaged(chance: random.Random, data: bytes) -> tuple[str, bytes]:
    """Damage the data; return the name of the damage, and bytes that differ from `data`."""
    while True:
        kind = chance.choice(KINDS) if data else lengthen
        found = bytes(kind(chance, bytearray(data)))
        if found != data:
            return kind.__name__, found
