"""Decodes rows in memory with the store's own decoder."""

from __future__ import annotations

import numpy as np

from stillhouse.signals.decode import StoredSignal, entries_signal, pad
from stillhouse.signals.encoded_rows import DenseRows, EntryRows
from stillhouse.signals.encodings import EntryEncoding
from stillhouse.signals.store import live_source


def decode(encoding: EntryEncoding, rows: EntryRows | DenseRows) -> StoredSignal:
    assert isinstance(rows, EntryRows)
    one = np.array([len(rows)])
    return entries_signal(
        encoding, pad([live_source(rows, one, np.arange(len(rows)))], len(rows)), 1.0
    )
