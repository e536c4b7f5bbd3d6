"""Trials with training data files: valid ones in every form, and unusual or damaged ones.

Half of the trials are valid combinations of form, chat template, file format, encoding, and
compression, which must be learned exactly. The other half cycle through a list of unusual cases.
"""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa

from bench.input_trials import files, odd_chats, odd_files, public_rows
from bench.input_trials.chat_formats import ChatFormat
from bench.input_trials.reading import (
    BY_NAME,
    SOUND,
    judged,
)  # fmt: skip
from bench.input_trials.rows import (
    FLAT,
    FORMS,
    Form,
    Writer,
    make_row,
)  # fmt: skip
from bench.input_trials.trial import Trial

QUIRKS = (*odd_chats.QUIRKS, *odd_files.QUIRKS, *public_rows.QUIRKS)


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    if number % 2 == 0:
        return sound(chance, folder)
    return QUIRKS[(number // 2) % len(QUIRKS)](chance, folder)


def sound(chance: random.Random, folder: Path) -> Trial:
    format = BY_NAME[chance.choice(SOUND)]
    writer = Writer(chance)
    kind = chance.choice(["jsonl", "jsonl", "json", "json object", "csv", "tsv", "parquet"])
    form: Form = chance.choice(FLAT if kind in ("csv", "tsv") else FORMS)
    features = _features(chance, format)
    rows = [make_row(form, writer, format, features) for _ in range(chance.randint(2, 8))]
    try:
        data = files.content([row.value for row in rows], kind, chance)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # arguments of several types in one column
        kind = "jsonl"
        data = files.content([row.value for row in rows], kind, chance)
    if kind != "parquet":
        data = _dressed(data, kind, chance)
    packed = chance.choice(["", "", "", ".gz", ".zst"])
    ending = kind.split(" ")[0]
    name = chance.choice(["rows", "my rows", "Zeilen-äöü", "rows.v2", "[2026] rows"])
    if chance.random() < 0.1:
        ending = ending.upper()
    path = files.write(folder, f"{name}.{ending}{packed}", files.compress(data, packed))
    return judged(f"sound: {form} in {kind}{packed} {'+'.join(features)}", path, rows, format)


def _features(chance: random.Random, format: ChatFormat) -> list[str]:
    """Choose features that the template writes."""
    candidates = ["system", "developer", "reasoning", "calls", "weights"]
    fine = [
        f for f in candidates if f not in format.drops | format.refuses
        and not (f == "calls" and "tool" in format.refuses)
    ]  # fmt: skip
    chosen = [feature for feature in fine if chance.random() < 0.4]
    return chosen if "system" not in chosen else [f for f in chosen if f != "developer"]


def _dressed(data: bytes, kind: str, chance: random.Random) -> bytes:
    """Add a byte order mark or blank lines, or change the line endings."""
    text = data.decode()
    if kind == "jsonl":
        text = text.replace("\n", chance.choice(["\n", "\n", "\r\n", "\n\n"]))
        text = text.rstrip("\r\n") if chance.random() < 0.3 else text
    return text.encode(chance.choice(["utf-8", "utf-8", "utf-8-sig"]))
