"""Checks that a rendered chat contains the chat's complete content.

A chat template is a program, and silently omits what it does not support: tool calls, `tools`,
reasoning, or a developer message. So the text of a supervised turn must be in the turn's supervised
part, and the text of every other message in the complete rendering. Texts are compared without
whitespace, because templates trim them, and also as JSON strings. A short text can occur in a
rendering by chance, so the chat is also rendered with each text replaced by a made-up word, which
must appear.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from stillhouse.data.chat_formats import is_blank, joined_text
from stillhouse.data.reasoning import KEYS, MARKS
from stillhouse.data.template_form import TemplateForm
from stillhouse.errors import DataError

_SURELY = 24
"""Length from which a text does not occur in a rendering by chance."""
_KNOWN_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "id", *KEYS}

REASONING_LEFT_OUT = "the chat template leaves out the reasoning of earlier turns"
TEXT_CHANGED = "the chat template changes the text of a message ({role})"
LEFT_OUT_LATER = "the chat template leaves out a message ({role}) before later turns"
NAME_LEFT_OUT = "the chat template leaves out the `name` of a message ({role})"
TOOLS_SHORTENED = "the chat template leaves out parts of the schemas in `tools`"
KEY_LEFT_OUT = "the chat template does not read `{key}` of a message"


class Rendering:
    """A rendered text to search in."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def compact(self) -> str:
        return _compact(self.text)

    def shows(self, text: str) -> bool:
        """Whether the text occurs here, ignoring whitespace, or as a JSON string."""
        if text.strip() in self.text or _compact(text) in self.compact:
            return True
        escaped = (json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
        return any(_compact(form) in self.compact for form in escaped)


def prove_turn(message: Mapping[str, Any], index: int, written: str, form: TemplateForm) -> None:
    """Raise DataError if part of an assistant turn is not supervised.

    written: the supervised text of the turn.
    """
    found = Rendering(written)
    name = f"messages[{index}]"
    content = joined_text(message.get("content"))
    # The template may write the reasoning tags itself, and the prompt may end with one.
    parts = MARKS.split(content)
    if not found.shows(content) and not all(map(found.shows, (parts.reasoning, parts.answer))):
        raise _left_out(f"`{name}.content` (assistant)", _fix_of_content(content))
    for key in KEYS:
        if isinstance(message.get(key), str) and not found.shows(message[key]):
            raise _left_out(
                f"`{name}.{key}`",
                f"write the reasoning into the content, as <think>...</think> before the answer; "
                f"use a template that reads `{key}`; or remove the key to train only on the answer",
            )
    _prove_calls(message, name, found, form)


def prove_context(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    rendered: str,
    form: TemplateForm,
    prompts: Mapping[int, str],
) -> list[str]:
    """List what the template omits from earlier turns by design.

    messages: the messages in `rendered`; the last one is a turn that `prove_turn` has checked.
    prompts: the prompts of the supervised turns, by index. A message may appear only in one of them
    (for example, Mistral's system prompt after tool results). Raises DataError if any other message
    or a tool is omitted.
    """
    found = Rendering(rendered)
    notes = dict.fromkeys(_keys_left_out(messages[-1], found, form))
    stand_in = _stand_in(messages, tools, form)
    for index, message in enumerate(messages[:-1]):
        role, content = message["role"], joined_text(message.get("content"))
        shown = found.shows(content)
        if role == "assistant":
            apart = [message[key] for key in KEYS if isinstance(message.get(key), str)]
            parts = MARKS.split(content)
            shown = shown or found.shows(parts.answer)
            if not all(map(found.shows, apart)) or not found.shows(parts.reasoning):
                notes[REASONING_LEFT_OUT] = None
                content = parts.answer
            _prove_calls(message, f"messages[{index}]", found, form)
        notes |= dict.fromkeys(_keys_left_out(message, found, form))
        if is_blank(content):
            continue
        in_place = stand_in is None or _word(index) in stand_in
        if not shown and in_place and stand_in is not None:
            notes[TEXT_CHANGED.format(role=role)] = None
        elif not shown or (not in_place and not _surely(content, messages, found)):
            if any(
                _word(index) in (_stand_in(messages[: turn + 1], tools, form) or "")
                and Rendering(prompt).shows(content)
                for turn, prompt in prompts.items()
                if turn > index
            ):
                notes[LEFT_OUT_LATER.format(role=role)] = None
                continue
            raise _left_out(
                f"`messages[{index}]` ({role})",
                "use a template that reads this role, change it to a role that the template reads "
                "(for `developer`: system), or remove the message",
            )
    notes |= dict.fromkeys(_prove_tools(tools, found, stand_in))
    return list(notes)


def _keys_left_out(
    message: Mapping[str, Any], found: Rendering, form: TemplateForm
) -> Iterator[str]:
    role = message["role"]
    for key in message.keys() - _KNOWN_KEYS:
        if message[key] not in ("", [], {}) and not form.names(key):
            yield KEY_LEFT_OUT.format(key=key)
    name = message.get("name")
    if role not in ("tool", "assistant") and isinstance(name, str) and not found.shows(name):
        yield NAME_LEFT_OUT.format(role=role)


def _prove_calls(
    message: Mapping[str, Any], name: str, found: Rendering, form: TemplateForm
) -> None:
    for number, call in enumerate(message.get("tool_calls") or []):
        inner = call.get("function", call)
        leaves = [inner["name"], *_leaves(inner.get("arguments"))]
        missing = [leaf for leaf in leaves if not found.shows(leaf)]
        if missing or form.leaves_out_calls:
            raise _left_out(
                f"`{name}.tool_calls[{number}]` ({(missing or leaves)[0][:60]!r})",
                "use a template that writes tool calls, write the call into the content as the "
                "model should generate it, or remove the row",
            )


def _prove_tools(
    tools: Sequence[Any] | None, found: Rendering, stand_in: str | None
) -> Iterator[str]:
    for number, tool in enumerate(tools or []):
        inner = _function(tool)
        shown = isinstance(inner.get("name"), str) and found.shows(inner["name"])
        if not shown or (stand_in is not None and _word(number, "tool") not in stand_in):
            raise _left_out(
                f"`tools[{number}]` ({inner.get('name')})",
                "use a template that writes tools, describe them in a system message, or remove "
                "`tools`",
            )
        if not all(map(found.shows, _described(inner))):
            yield TOOLS_SHORTENED


def _left_out(what: str, fix: str) -> DataError:
    return DataError(
        f"The chat template leaves out {what}: it is not in the rendered chat", fix=fix
    )


def _fix_of_content(content: str) -> str:
    if MARKS.split(content).reasoning:
        return (
            "use a template that keeps the reasoning of the last turn, or remove the reasoning to "
            "train only on the answer"
        )
    return "use a template that renders the complete content, or remove the row"


# --- a chat of made-up words -----------------------------------------------------------------


def _stand_in(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, form: TemplateForm
) -> str | None:
    """Render the prompt of the last turn with each text and tool name replaced by a unique word.

    None if the template does not accept that. It depends only on the messages' form.
    """
    shape = tuple(
        (m["role"], type(m.get("content")).__name__, is_blank(joined_text(m.get("content"))),
         len(m.get("tool_calls") or []))
        for m in messages[:-1]
    )  # fmt: skip
    key = (shape, json.dumps([sorted(_function(tool)) for tool in tools or []]))
    if key not in form.stand_ins:
        if len(form.stand_ins) >= 4096:
            form.stand_ins.clear()
        words = [_in_place(message, _word(index)) for index, message in enumerate(messages[:-1])]
        named = tools and [_renamed(tool, _word(n, "tool")) for n, tool in enumerate(tools)]
        form.stand_ins[key] = form.render(words, tools=named, generation_prompt=True)
    return form.stand_ins[key]


def _word(index: int, kind: str = "text") -> str:
    return f"zqx{kind}{index}zqx"


def _in_place(message: Mapping[str, Any], word: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [{"type": "text", "text": word}]}
    if isinstance(content, str) and not is_blank(content):
        return {**message, "content": word}
    return dict(message)


def _function(tool: Any) -> Mapping[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return inner if isinstance(inner, Mapping) else {}


def _renamed(tool: Any, word: str) -> Any:
    renamed = {**_function(tool), "name": word}
    return {**tool, "function": renamed} if "function" in tool else renamed


# --- texts -----------------------------------------------------------------------------------


def _surely(content: str, messages: Sequence[Mapping[str, Any]], found: Rendering) -> bool:
    """Whether a text is so long, and occurs so often, that it cannot be from another message."""
    bare = _compact(content)
    expected = sum(_compact(joined_text(m.get("content"))).count(bare) for m in messages)
    return len(bare) >= _SURELY and found.compact.count(bare) >= expected


def _described(function: Mapping[str, Any]) -> list[str]:
    """The texts that describe a tool to a model: descriptions and parameter names."""
    words = [function["description"]] if isinstance(function.get("description"), str) else []
    for key, value in function.items():
        if isinstance(value, Mapping):
            flat = key == "parameters" and all(isinstance(v, Mapping) for v in value.values())
            if key == "properties" or flat:  # some rows give the parameters without a schema
                words += [str(name) for name in value]
                for item in value.values():
                    words += _described(item) if isinstance(item, Mapping) else []
            else:
                words += _described(value)
    return words


def _leaves(value: Any) -> list[str]:
    """The keys and values in the arguments of a call, as text."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in (str(key), *_leaves(item))]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, str):
        return [value]
    return [] if value is None or isinstance(value, bool) else [json.dumps(value)]


def _compact(text: str) -> str:
    return "".join(text.split())
