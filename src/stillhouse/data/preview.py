"""Shows windows for inspection: supervised tokens, context, and document boundaries.

A row is rejected unless its tokens contain all of it, so the tokens show the complete row and which
parts are supervised. Supervised text is also bracketed, for terminals without colors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from stillhouse.data.shift import IGNORED
from stillhouse.data.windows import Windows

SUPERVISED = "bold green"
CONTEXT = "cyan"
PADDING = "dim"
MARKS = "dim"
OPENS, CLOSES = "⟦", "⟧"


def preview(windows: Windows, tokenizer: Any, rows: int) -> RenderableType:
    """Render the first `rows` windows with rich, colored by loss mask.

    The first token of a document is context, because nothing precedes it. Windows are stored in
    random order, so the first ones are a sample.
    """
    legend = Text.assemble(
        (OPENS, MARKS),
        ("supervised", SUPERVISED),
        (CLOSES, MARKS),
        "  ",
        ("context", CONTEXT),
        "  ",
        ("padding", PADDING),
    )
    parts: list[RenderableType] = [*_rows_read(windows), legend]
    for row in range(min(rows, len(windows))):
        parts.append(Rule(_counts(windows, row), style="dim", align="left"))
        parts += _window(windows, tokenizer, row)
    return Group(*parts)


def _rows_read(windows: Windows) -> Iterator[Text]:
    """The formats of the rows that were read, and the parts that are not supervised."""
    if windows.info.formats:
        formats = (f"{count:,} {name}" for name, count in windows.info.formats.items())
        yield Text(f"rows read: {', '.join(formats)}")
    for note, count in windows.info.notes.items():
        yield Text(f"{count:,} rows: {note}", style="yellow")


def segments(windows: Windows, row: int) -> tuple[list[slice], slice]:
    """The slices of the documents (or parts of documents) in a window, and of its padding."""
    position_ids_L = windows.position_ids_RL[row]
    starts = [*np.flatnonzero(position_ids_L == 0).tolist(), windows.context]
    parts = [slice(start, end) for start, end in pairwise(starts)]
    last = parts[-1]
    ids_L, labels_L = windows.input_ids_RL[row], windows.labels_RL[row]
    padded = (ids_L[last] == windows.info.pad_token_id).all() and (labels_L[last] == IGNORED).all()
    return (parts[:-1], last) if padded else (parts, slice(windows.context, windows.context))


def _counts(windows: Windows, row: int) -> Text:
    documents, padding = segments(windows, row)
    supervised = int((windows.labels_RL[row] != IGNORED).sum())
    pads = padding.stop - padding.start
    tokens = windows.context - pads
    number = f"{len(documents)} document{'s' if len(documents) != 1 else ''}"
    share = supervised / max(tokens, 1)
    return Text(
        f"window {row}: {number}, {tokens:,} tokens, {supervised:,} supervised ({share:.0%}), "
        f"{pads:,} padding"
    )


def _window(windows: Windows, tokenizer: Any, row: int) -> Iterator[Text]:
    documents, padding = segments(windows, row)
    for number, part in enumerate(documents, 1):
        text = Text.assemble((f"[{number}] ", "dim"))
        ids = windows.input_ids_RL[row][part].tolist()
        supervised = (windows.labels_RL[row][part] != IGNORED).tolist()
        pairs = zip(supervised, ids, strict=True)
        for is_supervised, run in groupby(pairs, itemgetter(0)):
            tokens = [token for _, token in run]
            piece = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
            marks = (OPENS, CLOSES) if is_supervised else ("", "")
            text.append(marks[0], MARKS).append(piece, SUPERVISED if is_supervised else CONTEXT)
            text.append(marks[1], MARKS)
        yield text
    if padding.stop > padding.start:
        yield Text(f"{padding.stop - padding.start:,} × padding", style=PADDING)
