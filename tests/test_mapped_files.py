"""Weights that are mapped from their files leave memory, and nothing else changes."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.mapped_files import PAGES, MappedPages, file_mappings

pytestmark = [
    pytest.mark.run,
    pytest.mark.skipif(
        sys.platform != "linux" or not os.access(PAGES, os.R_OK), reason="no pagemap here"
    ),
]
NUMBERS = 1 << 20


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    """Two tensors of 4 MiB each that are mapped from one file."""
    values = {name: torch.arange(float(NUMBERS)) + n for n, name in enumerate("ab")}
    save_file(values, tmp_path / "model.safetensors")
    return load_file(tmp_path / "model.safetensors")


def pages_of(*tensors: Tensor) -> MappedPages:
    return MappedPages.of(tensors, file_mappings())


def resident_pages(pages: MappedPages) -> int:
    """How many of the pages are in this process's memory."""
    found = 0
    with PAGES.open("rb") as file:
        for start, end in pages.spans:
            file.seek(start // mmap.PAGESIZE * 8)
            entries = np.frombuffer(file.read((end - start) // mmap.PAGESIZE * 8), np.uint64)
            found += int((entries >> np.uint64(63)).sum())
    return found


def test_pages_leave_memory_and_come_back(weights: dict[str, Tensor]) -> None:
    pages = pages_of(weights["a"])
    assert len(pages.spans) == 1
    before = weights["a"].sum()
    assert resident_pages(pages) * mmap.PAGESIZE >= weights["a"].nbytes
    pages.release()
    assert resident_pages(pages) == 0
    assert torch.equal(weights["a"].sum(), before)
    assert torch.equal(weights["a"], torch.arange(float(NUMBERS)))


def test_only_the_tensors_own_pages_leave(weights: dict[str, Tensor]) -> None:
    weights["b"].sum()
    pages_of(weights["a"]).release()
    own = pages_of(weights["b"])
    (start, end), *_ = own.spans
    inner = MappedPages(((start + mmap.PAGESIZE, end - mmap.PAGESIZE),))
    assert resident_pages(inner) == (end - start) // mmap.PAGESIZE - 2


def test_a_changed_weight_keeps_its_values(weights: dict[str, Tensor]) -> None:
    weights["a"][NUMBERS // 2] = -1.0
    pages = pages_of(*weights.values())
    pages.release()
    assert weights["a"][NUMBERS // 2] == -1.0
    assert resident_pages(pages) > 0


def test_memory_of_no_file_stays() -> None:
    own = torch.arange(float(NUMBERS))
    pages = pages_of(own)
    assert pages.spans == ()
    pages.release()
    assert own[-1] == NUMBERS - 1
