"""Memory of weights that are mapped from their files, as safetensors loads them (Linux).

Pages that were read count as resident memory, although the file has the same bytes. Between two
uses of a layer they can be unmapped: the next use maps them again from the system's page cache.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

MAPS = Path("/proc/self/maps")
PAGES = Path("/proc/self/pagemap")
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
"""Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst of Linux)."""

Span = tuple[int, int]
"""A first address, and the one after the last."""


@dataclass(frozen=True)
class MappedPages:
    """Pages of private mappings of files."""

    spans: tuple[Span, ...] = ()

    @classmethod
    def of(cls, tensors: Iterable[Tensor], mappings: list[Span]) -> MappedPages:
        """The pages in which these tensors are. mappings: from `file_mappings`."""
        spans: list[Span] = []
        for tensor in sorted(tensors, key=Tensor.data_ptr):
            if tensor.device.type != "cpu" or not tensor.numel():
                continue
            storage = tensor.untyped_storage()
            first = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            after = -(-(storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE) * mmap.PAGESIZE
            place = bisect.bisect_right(mappings, (first, sys.maxsize)) - 1
            if place < 0 or after > mappings[place][1]:
                continue
            if spans and first <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(after, spans[-1][1])
            else:
                spans.append((first, after))
        return cls(tuple(spans))

    def release(self) -> None:
        """Unmap the pages. Those of a tensor that was written to stay."""
        for start, end in self.spans:
            if _is_unchanged(start, end):
                length = ctypes.c_size_t(end - start)
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, mmap.MADV_DONTNEED)


def file_mappings() -> list[Span]:
    """Addresses of the private mappings of files, sorted; [] on other systems than Linux."""
    if sys.platform != "linux":
        return []
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        span, permissions, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0" and permissions.endswith("p"):
            start, end = (int(each, 16) for each in span.split("-"))
            found.append((start, end))
    return sorted(found)


def _is_unchanged(start: int, end: int) -> bool:
    """Whether all pages are the file's: a page that was written to is a copy, which would be lost.

    False if the system does not tell.
    """
    pages, size = (end - start) // mmap.PAGESIZE, np.dtype(np.uint64).itemsize
    try:
        with PAGES.open("rb", buffering=0) as file:
            file.seek(start // mmap.PAGESIZE * size)
            entries_P = np.frombuffer(file.read(pages * size), np.uint64)
    except OSError:
        return False
    copied_P = ((entries_P & _PRESENT) != 0) & ((entries_P & _OF_FILE) == 0)
    return len(entries_P) == pages and not (copied_P | ((entries_P & _SWAPPED) != 0)).any()
