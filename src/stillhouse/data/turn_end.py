"""Finds the token that ends an assistant turn.

It is supervised, generation stops at it, and an exported model lists it among its EOS tokens. Chat
templates do not declare it, and it is often not the tokenizer's EOS: Gemma ends turns with
`<end_of_turn>`, Phi-3 with `<|end|>`, and a Qwen base model with `<|im_end|>`. So it is read from
what the template writes after the answer in a made-up chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from stillhouse.data.template_form import template_form

_ANSWER = "Zq7gamma"
_TURNS = (
    {"role": "user", "content": "alpha"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "delta"},
)
_SYSTEM = {"role": "system", "content": "beta"}


@dataclass(frozen=True)
class TurnEnd:
    """The token (id and text) that ends a turn.

    written: whether the chat template writes it after every answer. If not, it is the first token
    of the next turn if the model stops there, otherwise EOS, and it is added to the training text.
    tail: everything that the template writes after the last answer of a chat. stops: the tokens at
    which the model stops.
    """

    id: int
    text: str
    written: bool
    tail: str = ""
    stops: tuple[str, ...] = ()


def turn_end(tokenizer: Any) -> TurnEnd | None:
    """The end of an assistant turn; None if the tokenizer has neither such a token nor EOS.

    It is EOS without a chat template, or with one that does not accept a simple chat.
    """
    template = repr(getattr(tokenizer, "chat_template", None))
    return _find(tokenizer, template, tokenizer.eos_token_id, str(tokenizer.name_or_path))


@lru_cache(maxsize=16)
def _find(tokenizer: Any, _template: str, eos: int | None, folder: str) -> TurnEnd | None:
    stops = _texts(tokenizer, [eos, *_configured(folder)])
    tails = _tails(tokenizer)
    tail = ""
    if tails is not None:
        tail, more = tails
        pattern = _pattern(tokenizer)
        written = [(match.group(), match.end()) for match in re.finditer(pattern, tail)]
        # The last answer of a chat may be followed by more than earlier ones (Phi-3: EOS), or end
        # with a different token (gpt-oss: <|return|>, at which the model stops).
        common = [token for token, end in written if more[:end] == tail[:end]]
        found = common or [token for token, _ in written]
        if found:
            token = next((token for token in found if token in stops), found[0])
            return TurnEnd(tokenizer.convert_tokens_to_ids(token), token, True, tail, stops)
        following = re.match(rf"\s*({pattern})", more)
        if following is not None and following[1] in stops:
            id = tokenizer.convert_tokens_to_ids(following[1])
            return TurnEnd(id, following[1], False, tail, stops)
    if eos is None:
        return None
    return TurnEnd(int(eos), str(tokenizer.convert_ids_to_tokens(eos)), False, tail, stops)


def end_of_answers(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """The ids that end an answer: those in the generation config, EOS, and the end of a turn.

    generation_config: the model's; None: the one next to the tokenizer's files, if any.
    """
    if generation_config is None:
        ids = _configured(str(tokenizer.name_or_path))
    else:
        ids = _listed(generation_config.eos_token_id)
    end = turn_end(tokenizer)
    return frozenset(_listed([*ids, tokenizer.eos_token_id, end and end.id]))


def stop_at_turn_end(model: Any, tokenizer: Any) -> None:
    """Add the end of a turn and EOS to the model's `generation_config.eos_token_id`.

    Does nothing if the end of a turn is already in it.
    """
    end, config = turn_end(tokenizer), getattr(model, "generation_config", None)
    if end is None or config is None:
        return
    listed = _listed(config.eos_token_id)
    if end.id in listed:
        return
    found = list(dict.fromkeys(_listed([*listed, tokenizer.eos_token_id, end.id])))
    config.eos_token_id = found if len(found) > 1 else found[0]
    keep_other_values(config)


def keep_other_values(generation_config: Any) -> None:
    """Let transformers save a generation config whose token ids were changed.

    transformers saves an unchanged config as is, but rejects a changed one with values that have no
    effect, such as a temperature without do_sample, which many published models have.
    """
    generation_config._original_object_hash = hash(generation_config)


def text_until_end(text: str, tokenizer: Any) -> int:
    """Number of characters of a rendered assistant turn, including the token that ends it.

    Templates put whitespace after that token, and some a second token, but generation has already
    stopped there. A turn that ends with a different token (a tool call's) ends there.
    """
    end = turn_end(tokenizer)
    if end is not None and end.written and text.endswith(end.tail):
        return len(text) - len(end.tail) + end.tail.index(end.text) + len(end.text)
    trimmed = text.rstrip()
    run = re.search(rf"(?:\s|{_pattern(tokenizer)})*\Z", trimmed)
    if run is None or not run.group():
        return len(text)
    if end is not None and end.text in run.group():
        return run.start() + run.group().index(end.text) + len(end.text)
    return len(trimmed)


def _tails(tokenizer: Any) -> tuple[str, str] | None:
    """The text that the template writes after the last answer of a chat, and after an answer that a
    user turn follows. None if the template does not accept a simple chat."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    form = template_form(tokenizer)
    for start in ((), (_SYSTEM,)):
        turns = form.fit([*start, *_TURNS])
        chats = [form.render(turns[:-1]) or "", form.render(turns) or ""]
        if all(_ANSWER in chat for chat in chats):
            last, more = (chat.rpartition(_ANSWER)[2] for chat in chats)
            return last, more
    return None


def _pattern(tokenizer: Any) -> str:
    """A pattern that matches the tokenizer's added tokens, the longest first."""
    return _pattern_of(tokenizer, len(tokenizer))


@lru_cache(maxsize=16)
def _pattern_of(tokenizer: Any, _size: int) -> str:
    tokens = sorted(map(str, tokenizer.added_tokens_encoder), key=len, reverse=True)
    return "|".join(map(re.escape, tokens)) or r"(?!)"


def _texts(tokenizer: Any, ids: Iterable[int | None]) -> tuple[str, ...]:
    known = [one for one in ids if one is not None and one < len(tokenizer)]
    return tuple(str(tokenizer.convert_ids_to_tokens(one)) for one in dict.fromkeys(known))


def _configured(folder: str) -> Sequence[int]:
    """eos_token_id in the generation_config.json next to the tokenizer; empty if it has none."""
    if not folder:
        return []
    try:
        text = (Path(folder) / "generation_config.json").read_text(encoding="utf-8")
        return _listed(json.loads(text).get("eos_token_id"))
    except (OSError, ValueError, AttributeError):
        return []


def _listed(ids: Any) -> list[int]:
    found = ids if isinstance(ids, list | tuple) else [ids]
    return [int(one) for one in found if one is not None]
