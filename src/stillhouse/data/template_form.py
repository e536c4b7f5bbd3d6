"""The form in which a chat template reads messages, found by rendering made-up chats.

Templates differ in what they accept: content as a string or as a list of parts, the arguments of a
tool call as an object or as JSON text, reasoning under one key or another. A chat is put into the
form that its template reads before it is rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from stillhouse.data.call_ids import IdForm, with_call_ids
from stillhouse.data.chat_formats import joined_text
from stillhouse.data.chat_template import render_chat, template_errors
from stillhouse.data.control_tokens import ControlTokens
from stillhouse.data.reasoning import KEYS
from stillhouse.data.tool_formats import from_json

_USER, _ASSISTANT, _KEY = "zqxasked", "zqxsaid", "zqxkey"
_PARAMETERS = {"type": "object", "properties": {"zqx": {"type": "string"}}, "required": ["zqx"]}
_TOOL = {
    "type": "function",
    "function": {"name": "zqxtool", "description": "zqx", "parameters": _PARAMETERS},
}


def template_form(tokenizer: Any, *, tools: bool = False) -> TemplateForm:
    """That of the tokenizer's chat template. tools: for chats with tools, for which a tokenizer may
    have a template of its own."""
    return _form(tokenizer, str(getattr(tokenizer, "chat_template", None)), tools)


@lru_cache(maxsize=16)
def _form(tokenizer: Any, template: str, tools: bool) -> TemplateForm:
    return TemplateForm(tokenizer, template, tools)


class TemplateForm:
    def __init__(self, tokenizer: Any, template: str, tools: bool) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.tools = [_TOOL] if tools else None
        self.stand_ins: dict[Any, str | None] = {}
        """Renderings of `chat_proof`, kept because most rows have one of a few forms."""

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str | None:
        """None if the template does not accept the messages."""
        try:
            return render_chat(self.tokenizer, messages, **options)
        except template_errors():
            return None

    def fit(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template reads them."""
        fitted = [self._fit(dict(message)) for message in messages]
        if not self.names_ids or not any(map(_has_call, fitted)):
            return fitted
        return with_call_ids(fitted, form=self.id_form, names=self.writes_result_names)

    def fit_tools(self, tools: Sequence[Any] | None) -> tuple[Any, ...] | None:
        """The tools as the template reads them: those that are a function alone, without
        `{"type": "function", "function": ...}`, get that where the template needs it."""
        if tools is None or all("function" in tool for tool in tools) or self.reads_bare_tools:
            return tools if tools is None else tuple(tools)
        return tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)

    def _fit(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list) and all("text" in part for part in content):
            texts = [{"type": "text", "text": part["text"]} for part in content]
            message["content"] = texts if self.reads_parts else joined_text(content)
        elif isinstance(content, str) and not self.reads_strings and self.reads_parts:
            message["content"] = [{"type": "text", "text": content}]
        elif content is None and self.prints_none:
            message["content"] = ""
        if message.get("tool_calls"):
            message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return self._reasoning(message)

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if "function" not in call and not self.reads_bare_calls:
            about = {key: call[key] for key in ("id", "type") if key in call}
            function = {key: value for key, value in call.items() if key not in about}
            call = {"type": "function", **about, "function": function}
        inner = call.get("function", call)
        given = inner.get("arguments")
        arguments = given
        if isinstance(given, str) and not self.reads_argument_text:
            decoded = from_json(given, "a tool call")
            arguments = decoded if isinstance(decoded, Mapping) else given
        elif (
            isinstance(given, Mapping)
            and not self.reads_argument_objects
            and self.reads_argument_text
        ):
            arguments = json.dumps(given, ensure_ascii=False)
        if arguments is given:
            return dict(call)
        fitted = {**inner, "arguments": arguments}
        return {**call, "function": fitted} if "function" in call else fitted

    def _reasoning(self, message: dict[str, Any]) -> dict[str, Any]:
        """Under the key that the template reads, if there is one."""
        given = {key: message[key] for key in KEYS if isinstance(message.get(key), str)}
        if not given or any(map(self.names, given)) or len({*given.values()}) > 1:
            return message
        key = next(filter(self.names, KEYS), None)
        if key is None:
            return message
        rest = {name: value for name, value in message.items() if name not in given}
        return {**rest, key: next(iter(given.values()))}

    def names(self, key: str) -> bool:
        """Whether the template's source names a key of messages."""
        return bool(re.search(rf"[.'\"]{re.escape(key)}(?!\w)", self.template))

    @cached_property
    def reads_strings(self) -> bool:
        return self._shows(_USER, _ASSISTANT)

    @cached_property
    def reads_parts(self) -> bool:
        """Whether lists of text parts are read, and not printed as a list."""
        user, assistant = ([{"type": "text", "text": t}] for t in (_USER, _ASSISTANT))
        return self._shows(user, assistant)

    def _shows(self, user: Any, assistant: Any) -> bool:
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
        text = self.render(chat, tools=self.tools)
        if text is None or _USER not in text or _ASSISTANT not in text:
            return False
        printed = "".join(text.split()).replace("'", '"')
        return '"type":"text"' not in printed

    @cached_property
    def reads_bare_tools(self) -> bool:
        """Whether a tool's name is written that is not inside of `function`."""
        user = self._fit({"role": "user", "content": _USER})
        text = self.render([user], tools=[_TOOL["function"]], generation_prompt=True)
        return text is not None and "zqxtool" in text

    @cached_property
    def reads_bare_calls(self) -> bool:
        """Whether a tool call is written whose name is not inside of `function`."""
        arguments: Any = {_KEY: _ASSISTANT}
        if not self.reads_argument_objects and self.reads_argument_text:
            arguments = json.dumps(arguments)
        text = self._call_rendered(arguments, bare=True)
        return bool(text and "zqxtool" in text and _ASSISTANT in text)

    @cached_property
    def prints_none(self) -> bool:
        """Whether the null content of a tool call is rejected, or written as `None`."""
        with_none = self._call_rendered({_KEY: _ASSISTANT}, null=True)
        return with_none is None or "None" in with_none

    @cached_property
    def leaves_out_calls(self) -> bool:
        """Whether a tool call is not written, or not as a parser can read it."""
        accepted = self._call_rendered({_KEY: _ASSISTANT}) is not None
        return accepted and not (self.reads_argument_objects or self.reads_argument_text)

    @cached_property
    def reads_argument_objects(self) -> bool:
        text = self._call_rendered({_KEY: _ASSISTANT})
        return bool(text and _KEY in text and _ASSISTANT in text and f"{{'{_KEY}'" not in text)

    @cached_property
    def reads_argument_text(self) -> bool:
        """Whether arguments that are JSON text are written unchanged, and not encoded again."""
        arguments = json.dumps({_KEY: _ASSISTANT})
        text = self._call_rendered(arguments)
        return bool(text and arguments in text)

    @cached_property
    def names_ids(self) -> bool:
        """Whether the template's source names the ids of calls or results."""
        return self.names("id") or self.names("tool_call_id")

    @cached_property
    def id_form(self) -> IdForm:
        """The form of the ids of calls that is accepted, or that the template writes itself."""
        text = self._result_rendered("zqxcall01")
        if text is not None and self._result_rendered("call_zqx0123456789") is None:
            return "short"
        return "numbered" if text and "functions.zqxtool:0" in text else "any"

    @cached_property
    def writes_result_names(self) -> bool:
        """Whether the name of a tool result is written."""
        return "zqxresult" in (self._result_rendered("zqxcall01") or "")

    def _result_rendered(self, call_id: str) -> str | None:
        function = {"name": "zqxtool", "arguments": {_KEY: _ASSISTANT}}
        call = {"id": call_id, "type": "function", "function": function}
        result = {"role": "tool", "name": "zqxresult", "tool_call_id": call_id, "content": "zqx"}
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": _USER},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            result,
        ]
        fitted = [self._fit(message) for message in chat]
        return self.render(fitted, tools=self.tools, generation_prompt=True)

    def _call_rendered(
        self, arguments: Any, *, null: bool = False, bare: bool = False
    ) -> str | None:
        """A chat that ends with a tool call. null: its content is, whatever the template makes of
        that. bare: the call's name is not inside of `function`."""
        function = {"name": "zqxtool", "arguments": arguments}
        call = {"id": "zqxcall01", "type": "function", "function": function}
        if bare:
            call = {"id": "zqxcall01", **function}
        user = _USER if self.reads_strings else [{"type": "text", "text": _USER}]
        content = None if null or not self.prints_none else ""
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": content, "tool_calls": [call]},
        ]
        return self.render(chat, tools=self.tools)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        user = self._fit({"role": "user", "content": _USER})
        assistant = self._fit({"role": "assistant", "content": _ASSISTANT})
        chats = ([user, assistant], [user, assistant, user])
        framing = "".join(
            self.render(chat, generation_prompt=n > 0) or "" for n, chat in enumerate(chats)
        )
        return ControlTokens(self.tokenizer, framing)


def _has_call(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) or message["role"] == "tool"
