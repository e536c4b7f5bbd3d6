"""Read rows as training data, and compare what is learned with what the generator meant."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

import stillhouse as sh
from bench.input_trials import files
from bench.input_trials.chat_formats import DATE, FORMATS, ChatFormat, spelled, tokenizer
from bench.input_trials.rows import (
    Row,
    Seen,
    Writer,
    chat_row,
    difference,
)  # fmt: skip
from bench.input_trials.trial import Refusal, Trial

BY_NAME = {format.name: format for format in FORMATS}
SOUND = ("chatml", "llama3", "dated", "mistral", "gemma", "tooled")
CONTEXT = 6144
Quirk = Callable[[random.Random, Path], Trial]


# --- reading ---------------------------------------------------------------------------------


def read(texts: Any, format: ChatFormat, **options: Any) -> list[Seen]:
    """Return what Stillhouse would train on, with one document per window."""
    heldout = ["Nothing of this is trained on."]
    words = tokenizer(format)
    options = {"context": CONTEXT, "packing": "none", "heldout_tokens": 64, **options}
    train: Any = sh.Data.build(texts, words, heldout=heldout, **options).train
    pad = words.pad_token_id
    seen = []
    for row in range(len(train)):
        ids = np.asarray(train.input_ids_RL[row])
        taught = np.asarray(train.labels_RL[row]) != -100
        length = int(np.flatnonzero(ids != pad)[-1]) + 1
        seen.append(_seen(ids[:length].tolist(), taught[:length].tolist(), format))
    return seen


def _seen(ids: list[int], taught: list[bool], format: ChatFormat) -> Seen:
    pairs, done = [], 0
    for supervised, run in groupby(zip(taught, ids, strict=True), key=lambda each: each[0]):
        part = [token for _, token in run]
        if supervised:
            before = spelled(ids[:done], format)
            pairs.append((_undated(before, format), spelled(part, format)))
        done += len(part)
    return Seen(spelled(ids, format), tuple(pairs), len(ids), sum(taught))


def _undated(text: str, format: ChatFormat) -> str:
    if format.name != "dated":
        return text
    return re.sub(r"(?<=Today Date: )\d\d \w{3} \d{4}", DATE, text)


def judged(
    name: str,
    texts: Any,
    rows: Sequence[Row],
    format: ChatFormat,
    refusal: Refusal = "never",
    lost: tuple[str, ...] = (),
    **options: Any,
) -> Trial:
    """A trial that is right if exactly `rows` are learned."""
    return Trial(
        f"{name} ({format.name})",
        lambda: read(texts, format, **options),
        lambda seen: difference(rows, seen, format),
        refusal,
        lost,
    )


def refused(name: str, texts: Any, format: ChatFormat | None = None, **options: Any) -> Trial:
    """A trial whose input must be rejected."""
    return judged(name, texts, (), format or BY_NAME["chatml"], "must", **options)


def plain_rows(chance: random.Random, count: int = 4) -> tuple[Writer, ChatFormat, list[Row]]:
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "llama3", "mistral"])]
    return writer, format, [chat_row(writer.chat(), format) for _ in range(count)]


def saved(folder: Path, rows: Sequence[Row], name: str = "rows.jsonl") -> Path:
    return files.write(folder, name, files.jsonl([row.value for row in rows]))
