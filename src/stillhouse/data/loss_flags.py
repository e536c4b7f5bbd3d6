"""Reads the keys of messages and rows that select which turns are supervised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stillhouse.errors import DataError

LEARNED = ("weight", "train", "training", "loss", "trainable")
"""Keys whose value 1 or true means that a turn is supervised: those of OpenAI, Axolotl (two),
ms-swift, and Fireworks."""
MASKED = ("masked",)
"""Keys with the opposite meaning: torchtune's."""
OF_MESSAGE = re.compile(
    r"(^|_)(weights?|loss|mask|masks|masked|train|training|trainable|learn|learned|learnable"
    r"|supervised|ignored?|skip|skipped)(_|$)"
)
_OF_ROW = re.compile(r"(^|_)(weights?|loss|mask|masks|train|trainable)(_|$)")


def reject_suspects(keys: Mapping[str, Any], pattern: re.Pattern[str], owner: str) -> None:
    """Raise DataError for an unknown key that seems to change what is supervised.

    The value 1 is harmless unless the key may mean "masked"; 0 is harmless if it means "skipped".
    """
    for key, value in keys.items():
        harmless: tuple[Any, ...] = (None, [], 1)
        if re.search("skip|ignore", str(key)):
            harmless = (None, [], 0)
        elif "mask" in str(key) and "loss" not in str(key):
            harmless = (None, [])
        if pattern.search(str(key)) and value not in harmless:
            raise DataError(
                f"{owner} has an unknown key `{key}`, which seems to change what is trained on "
                f"(keys known in a message: {', '.join(f'`{k}`' for k in LEARNED + MASKED)})",
                fix="write `weight`: 0 in each assistant message that must not be trained on, and "
                f"remove or rename `{key}`",
            )


def reject_weighted_row(row: Mapping[str, Any]) -> None:
    """Raise DataError if a key of the row, such as `weight` or `train`, seems to be a loss flag.

    A string under such a key (`train: test`) has a different meaning and is accepted.
    """
    suspects = {k: v for k, v in row.items() if not isinstance(v, str)}
    reject_suspects(suspects, _OF_ROW, "The row")


def take_weights(messages: list[dict[str, Any]], key: str) -> frozenset[int]:
    """Remove the loss flags; return the indices of assistant turns that are context only."""
    context_only = set()
    for index, message in enumerate(messages):
        flags = {name: message.pop(name) for name in (*LEARNED, *MASKED) if name in message}
        reject_suspects(message, OF_MESSAGE, f"`{key}[{index}]`")
        for name, value in flags.items():
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                raise DataError(
                    f"`{key}[{index}].{name}` must be 0 or 1, but it is {value!r}",
                    fix="use 1 for a turn to train on, and 0 for a turn that is context only",
                )
        learned = {bool(value) == (name in LEARNED) for name, value in flags.items()}
        if len(learned) > 1:
            raise DataError(
                f"`{key}[{index}]` has contradictory loss flags: {flags}",
                fix="keep only one of these keys",
            )
        if message["role"] == "assistant" and learned == {False}:
            context_only.add(index)
        elif message["role"] != "assistant" and learned == {True}:
            raise DataError(
                f"`{key}[{index}]` is marked for training, but its role is {message['role']}: only "
                "assistant turns can be trained on",
                fix=f"remove `{next(iter(flags))}` from this message",
            )
    return frozenset(context_only)
