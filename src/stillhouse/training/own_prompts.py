"""Prompts for text that the student generates, as token ids in its own chat template."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.batches import Batches
from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.data_config import HubSource
from stillhouse.data.sources import hub_rows
from stillhouse.data.window_prompts import all_prompts
from stillhouse.errors import DataError
from stillhouse.generation.chat_frame import Frame, user_turn
from stillhouse.generation.generator import require_chat_template
from stillhouse.generation.request import Message
from stillhouse.synthesis.prompts import read_prompt, read_prompts
from stillhouse.training.train_config import OnPolicyPrompts

WHERE = "train.on_policy.prompts"
KEY = f"{WHERE}.key"
_IDS = "give text, or ids from the student's own tokenizer"


@dataclass(frozen=True, eq=False)
class OwnPrompts:
    """Distinct prompts, in order. ids: of all prompts, concatenated. ends: of each prompt in
    `ids`."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, prompts: Iterable[Sequence[int] | NDArray[np.int32]]) -> OwnPrompts:
        """Create from token ids, without duplicates. Raises DataError if a prompt is empty or has
        an id that no vocabulary contains."""
        found: dict[bytes, NDArray[np.int32]] = {}
        for number, prompt in enumerate(prompts):
            where = f"prompts[{number}]"
            try:
                ids = np.asarray(prompt, dtype=np.int32)
            except OverflowError:
                raise DataError(
                    "the prompt has a token id that does not fit in 32 bits", where=where, fix=_IDS
                ) from None
            if not len(ids):
                raise DataError("the prompt has no tokens", where=where, fix="leave it out")
            found.setdefault(ids.tobytes(), ids)
        lengths = [len(ids) for ids in found.values()]
        joined = np.concatenate([np.zeros(0, dtype=np.int32), *found.values()])
        return cls(joined, np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:
        start = int(self.ends[index - 1]) if index else 0
        found: list[int] = self.ids[start : int(self.ends[index])].tolist()
        return found

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.ends, prepend=0)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.ids.tobytes() + self.ends.tobytes()).hexdigest()


def require_tokens(prompts: OwnPrompts, vocabulary: int) -> None:
    """Raise DataError for an id that is not one of the student's tokens. `prompts` must not be
    empty."""
    for id_ in (int(prompts.ids.min()), int(prompts.ids.max())):
        if not 0 <= id_ < vocabulary:
            raise DataError(
                f"a prompt has the token id {id_:,}, but the student has {vocabulary:,} tokens",
                where=WHERE,
                fix=_IDS,
            )


def require_room(prompts: OwnPrompts, context: int) -> None:
    """Raise DataError if there are no prompts, or if one leaves no room for an answer."""
    if not len(prompts):
        raise DataError("there are no prompts", where=WHERE, fix="give a file with prompts")
    long = prompts.lengths >= context
    if long.any():
        first = int(np.flatnonzero(long)[0])
        raise DataError(
            f"{int(long.sum()):,} of {len(prompts):,} prompts fill the context of {context:,} "
            f"tokens and leave no room for an answer (prompt {first + 1} has "
            f"{int(prompts.lengths[first]):,})",
            where=WHERE,
            fix="raise data.context, or remove long prompts",
        )


def prompts_of_windows(windows: Batches) -> OwnPrompts:
    """The prompts in the training data, exactly as training reads them (see `window_prompts`).

    Raises DataError if there are none.
    """
    prompts = OwnPrompts.of(all_prompts(windows))
    if not len(prompts):
        raise DataError(
            "the training data has no chat or text that the student could continue",
            where=WHERE,
            fix="set train.on_policy.prompts.path to a file with prompts",
        )
    return prompts


# --- files, datasets, and lists ------------------------------------------------------------------


def read_own_prompts(section: OnPolicyPrompts, base: Path, tokenizer: Any) -> OwnPrompts:
    """Read the prompts of a file or a dataset, in the student's chat template.

    Raises DataError if something is not a prompt. ModelError if there is no chat template.
    """
    require_chat_template(tokenizer)
    frame = Frame(section.system)
    return OwnPrompts.of(
        _ids(tokenizer, frame.student_sees(messages), where)
        for messages, where in _messages(section, base)
    )


def _messages(section: OnPolicyPrompts, base: Path) -> Iterator[tuple[Sequence[Message], str]]:
    if section.path is not None:
        path = base / section.path
        for prompt in read_prompts(
            path,
            format=section.format,
            key=section.key,
            limit=section.limit,
            setting=KEY,
            learned=False,
        ):
            yield prompt.messages, prompt.where
        return
    fields = section.model_dump(include={"dataset", "config", "split", "limit"})
    source = HubSource(kind="hub", **fields)
    for row, where in itertools.islice(hub_rows(source, base), section.limit):
        yield _read(row, section.key, where), where


def made_prompts(given: Any, tokenizer: Any, *, key: str = "prompt") -> OwnPrompts:
    """Create prompts from a path, or from an iterable of strings, chats (lists of messages), rows,
    or lists of token ids.

    Raises DataError if something is not a prompt. ModelError if text needs a chat template and
    there is none.
    """
    if isinstance(given, str | Path):
        section = OnPolicyPrompts(path=str(given), key=key)
        return read_own_prompts(section, Path.cwd(), tokenizer)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise DataError(
            f"prompts cannot be read from a {type(given).__name__}",
            where="Rollouts",
            fix="give a path, or a list of strings, chats, rows, or token ids",
        )
    return OwnPrompts.of(
        _made(item, f"prompts[{number}]", tokenizer, key) for number, item in enumerate(given)
    )


def _made(item: Any, where: str, tokenizer: Any, key: str) -> Sequence[int]:
    if isinstance(item, Sequence) and item and all(isinstance(one, int) for one in item):
        return list(item)
    require_chat_template(tokenizer)
    if isinstance(item, str):
        if not item.strip():
            raise DataError("the prompt is empty", where=where, fix="leave it out")
        return _ids(tokenizer, user_turn(item), where)
    row = {"messages": item} if isinstance(item, list) else item
    if not isinstance(row, Mapping):
        raise DataError(
            f"a {type(item).__name__} is not a prompt",
            where=where,
            fix="give strings, chats (lists of messages), rows, or lists of token ids",
        )
    return _ids(tokenizer, _read(row, key, where), where)


def _read(row: Mapping[str, Any], key: str, where: str) -> Sequence[Message]:
    return read_prompt(row, key, where, setting=KEY, learned=False).messages


def _ids(tokenizer: Any, messages: Sequence[Message], where: str) -> list[int]:
    try:
        return chat_ids(tokenizer, messages)
    # A template is a program that comes with the model, and can raise anything.
    except Exception as error:
        raise DataError(
            f"the student's chat template rejects the prompt: {error}",
            where=where,
            fix="use the order and fields of messages that the template expects",
        ) from error
