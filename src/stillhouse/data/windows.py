"""Windows of tokens: three arrays, memory-mapped if they are in a folder, and a description.

R windows, L tokens in a window. `input_ids.npy`, `labels.npy`, and `position_ids.npy` are int32
[R, L]; `windows.json` is written last, so a folder that contains it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.data.packing import Window
from stillhouse.data.shift import IGNORED
from stillhouse.errors import DataError

ARRAYS = ("input_ids", "labels", "position_ids")
DESCRIPTION = "windows.json"
WINDOW_BYTES = 4 * (len(ARRAYS) + 1)
"""Bytes per token: its entries in the arrays, and the token itself while they are written."""
_AGAIN = "delete the folder and run the data stage again"


class WindowSet(Protocol):
    """Windows, in memory or on disk. Each has int64 tensors input_ids, labels, position_ids: [L].

    labels[t] is the token at position t if it is predicted (from position t-1), otherwise -100.
    position_ids restart at 0 with each document in a window.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class WindowsInfo:
    """The description of a set of windows.

    tokens: all tokens except padding. supervised_tokens: labels that are predicted. fill: tokens as
    a share of rows × context. duplicates_dropped: documents with the same content as an earlier
    one. overlap_removed: training documents that are also in heldout_sources. rows_truncated,
    rows_dropped: chat rows longer than the context. pad_token_id: fills incomplete windows.
    formats: number of documents read, by format. notes: number of documents with a part that is not
    supervised or not read, by note.
    """

    context: int
    rows: int
    tokens: int
    supervised_tokens: int
    documents: int
    fill: float
    duplicates_dropped: int
    overlap_removed: int
    rows_truncated: int
    rows_dropped: int
    packing: str
    pad_token_id: int
    formats: dict[str, int]
    notes: dict[str, int]


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """A map-style dataset: `len(windows)` rows, each a dict of int64 tensors of length L.

    path: the folder of the windows; None if they are in memory.
    """

    path: Path | None
    info: WindowsInfo
    input_ids_RL: NDArray[np.int32]
    labels_RL: NDArray[np.int32]
    position_ids_RL: NDArray[np.int32]

    @property
    def context(self) -> int:
        return self.info.context

    @property
    def supervised_tokens(self) -> int:
        return self.info.supervised_tokens

    def __len__(self) -> int:
        return self.info.rows

    def __repr__(self) -> str:
        learned = f"{self.supervised_tokens:,} to predict"
        return f"{len(self):,} windows of {self.context:,} tokens, {learned}"

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(getattr(self, f"{name}_RL")[index].astype(np.int64))
            for name in ARRAYS
        }


def write_windows(
    path: Path | None, windows: Iterable[Window], rows: int, context: int, **about: Any
) -> Windows:
    """Write `rows` windows to a folder, or keep them in memory if there is none.

    about: the fields of WindowsInfo that are not computed here.
    """
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        (path / DESCRIPTION).unlink(missing_ok=True)
    with ExitStack() as opened:
        # Write sequentially: a memory map keeps all pages that are written in memory.
        buffers = [BytesIO() for _ in ARRAYS] if path is None else []
        files: Sequence[BinaryIO] = buffers
        if path is not None:
            files = [opened.enter_context((path / f"{name}.npy").open("wb")) for name in ARRAYS]
            for file in files:
                header = {"descr": "<i4", "fortran_order": False, "shape": (rows, context)}
                np.lib.format.write_array_header_1_0(file, header)
        supervised = 0
        for window in windows:
            for name, file in zip(ARRAYS, files, strict=True):
                file.write(window[name].data)
            supervised += int((window["labels"] != IGNORED).sum())
    info = WindowsInfo(
        context=context,
        rows=rows,
        supervised_tokens=supervised,
        fill=about["tokens"] / (rows * context),
        **about,
    )
    if path is None:
        arrays = [np.frombuffer(buffer.getbuffer(), np.int32) for buffer in buffers]
        return Windows(path, info, *(array.reshape(rows, context) for array in arrays))
    text = json.dumps(asdict(info), indent=2, ensure_ascii=False)
    (path / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return open_windows(path)


def open_windows(path: Path) -> Windows:
    """Open a folder written by `write_windows`. Raises DataError if it is incomplete."""
    info = _read_info(path)
    return Windows(path, info, *(_open_array(path, name, info) for name in ARRAYS))


def _read_info(path: Path) -> WindowsInfo:
    file = path / DESCRIPTION
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("This is not a folder of windows", where=file, fix=_AGAIN) from error
    except (ValueError, OSError) as error:
        raise DataError(f"windows.json is damaged: {error}", where=file, fix=_AGAIN) from error
    if not isinstance(raw, dict) or set(raw) != {one.name for one in fields(WindowsInfo)}:
        raise DataError("windows.json is damaged or of another version", where=file, fix=_AGAIN)
    return WindowsInfo(**raw)


def _open_array(path: Path, name: str, info: WindowsInfo) -> NDArray[np.int32]:
    file = path / f"{name}.npy"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"An array of the windows is missing or truncated: {error}", where=file, fix=_AGAIN
        ) from error
    if array.shape != (info.rows, info.context) or array.dtype != np.int32:
        raise DataError(
            f"The array is {array.dtype} {list(array.shape)}, but windows.json states "
            f"int32 {[info.rows, info.context]}",
            where=file,
            fix=_AGAIN,
        )
    return array
