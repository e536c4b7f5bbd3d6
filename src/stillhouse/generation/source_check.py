"""Checks a text teacher before any request is sent: its key, packages, and chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stillhouse.data.chat_template import render_chat
from stillhouse.data.reasoning import THINK
from stillhouse.data.row_formats import document_from_row
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.errors import DataError, EndpointError, ModelError
from stillhouse.finding import Finding, finding_of
from stillhouse.generation.chat_frame import SYSTEM, text_of
from stillhouse.generation.generation_config import ApiTeacher, VllmTeacher
from stillhouse.generation.generator import require_chat_template
from stillhouse.generation.request import Message, endpoint_of
from stillhouse.generation.text_teacher import LocalText, TextSource
from stillhouse.generation.vllm_engine import lacks
from stillhouse.teachers.api_keys import api_key
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.planned_model import check_model_folder

Render = Callable[[Sequence[Message]], str]
"""Renders a chat. Raises whatever a chat template raises: jinja2 passes all exceptions through."""


@dataclass(frozen=True)
class FrameKeys:
    """The recipe keys that add a system prompt and few-shot examples to every chat."""

    system: str | None = None
    examples: str | None = None

    @classmethod
    def of(cls, section: str, system: str | None, examples: Sequence[Any]) -> FrameKeys:
        """The keys in a section; None for a key that the recipe does not set."""
        return cls(
            None if system is None else f"{section}.system",
            f"{section}.examples" if examples else None,
        )


NOTHING = FrameKeys()


def rendered_prompt(tokenizer: Any) -> Render:
    """Render a chat as the model's input, up to its answer."""
    return partial(render_chat, tokenizer, generation_prompt=True)


def rendered_training(tokenizer: Any, *, reasoning: bool = False) -> Render:
    """Render a chat and an answer as a student's training text.

    reasoning: put reasoning before the answer.
    """
    answer = f"{THINK[0]}\nAlpha.\n{THINK[1]}\n\nYes." if reasoning else "Yes."

    def render(messages: Sequence[Message]) -> str:
        row = {"messages": [*map(dict, messages), {"role": "assistant", "content": answer}]}
        document = document_from_row(row, "text", "the chats")
        assert document is not None
        list(tokenize([document], tokenizer))
        return text_of(messages, [message["role"] for message in messages])

    return render


def require_template(
    render: Render,
    chats: Iterable[tuple[Sequence[Message], str]],
    *,
    whose: str,
    where: object = None,
    keys: FrameKeys = NOTHING,
    fix: str = "write the messages in the order and with the fields that the template expects, or "
    "use a model with a different template",
) -> None:
    """Render the first chat of each form, and raise ModelError if one is not accepted.

    A form consists of the roles and the types of content, which determine what a template rejects.
    A system prompt that is silently omitted is also an error. chats: each with its place. whose:
    the model, in words. where: its folder. keys: the recipe keys that add messages around the
    prompts. fix: what to do about any other problem.
    """
    seen: set[Any] = set()
    for messages, place in chats:
        form = tuple(_form(message) for message in messages)
        if form in seen:
            continue
        seen.add(form)
        problem = _problem(render, messages)
        if problem is None:
            continue
        without = [message for message in messages if message["role"] not in SYSTEM]
        alone = without[-1:]
        if len(without) < len(messages) and _problem(render, without) is None:
            what = f"{whose}'s chat template does not accept a system prompt"
            fix = "remove the system messages from the prompts, or move their text to user messages"
            if keys.system is not None:
                fix = f"remove {keys.system}, or move its text to the prompt"
        elif len(alone) < len(without) and _problem(render, alone) is None and keys.examples:
            what, fix = f"{whose}'s chat template does not accept the examples", "remove "
            fix += f"{keys.examples}, or move them to the prompt"
        else:
            roles = ", ".join(message["role"] for message in messages)
            what = f"{whose}'s chat template rejects a chat with the roles {roles} ({place})"
        raise ModelError(f"{what}: {problem}", where=where, fix=fix)


def _form(message: Message) -> tuple[Any, ...]:
    content = message.get("content")
    kinds: tuple[Any, ...] = (type(content).__name__,)
    if isinstance(content, list):
        kinds += tuple(part.get("type") for part in content if isinstance(part, Mapping))
    return (message["role"], kinds, tuple(sorted(message)))


def _problem(render: Render, messages: Sequence[Message]) -> str | None:
    try:
        text = render(messages)
    except DataError as error:
        return error.what
    # A template is a program that comes with the model and can raise any exception.
    except Exception as error:
        return str(error).strip() or type(error).__name__
    for message in messages:
        content = message.get("content")
        if message["role"] in SYSTEM and isinstance(content, str) and content.strip() not in text:
            return "it leaves out the system prompt"
    return None


def require_key(api: ApiTeacher, key: str) -> Iterator[Finding]:
    """Yield an error if the API's key is missing. key: the source's key in the recipe."""
    try:
        api_key(api.key_env, where=endpoint_of(api.base_url), setting=f"{key}.api.key_env")
    except EndpointError as error:
        yield finding_of(error)


def require_source(
    source: TextSource,
    chats: Iterable[tuple[Sequence[Message], str]],
    *,
    whose: str,
    key: str,
    keys: FrameKeys = NOTHING,
) -> Iterator[Finding]:
    """Check that a text teacher can answer the chats.

    chats: as they will be sent, each with its place. whose: the model, in words. key: the source's
    key in the recipe. keys: see `require_template`. Yields a missing API key and what vLLM lacks;
    raises StillhouseError if no request can succeed.
    """
    if not isinstance(source, LocalText):
        yield from require_key(source.api, key)
        return
    if isinstance(source.own, VllmTeacher):
        # vLLM can load models that transformers cannot, so the folder itself is not checked.
        for level, text, fix in lacks(source.own, source.default.base, key=f"{key}.vllm"):
            yield Finding(level, "vLLM", text, fix)
    else:
        check_model_folder(source.source)
    tokenizer = load_tokenizer(source.source)
    require_chat_template(tokenizer)
    place = source.source.path
    require_template(rendered_prompt(tokenizer), chats, whose=whose, where=place, keys=keys)
