"""Finds the form of messages that a chat template accepts, by rendering made-up chats.

Templates differ in what they accept: content as a string or a list of parts, arguments of a tool
call as an object or JSON text, and reasoning under various keys. Before a chat is rendered, it is
converted to the form that its template accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from stillhouse.data.call_ids import IdForm, with_call_ids
from stillhouse.data.chat_formats import joined_text
from stillhouse.data.chat_template import TEMPLATE_ERRORS, render_chat
from stillhouse.data.control_tokens import ControlTokens
from stillhouse.data.reasoning import KEYS, THINK
from stillhouse.data.tool_formats import from_json

_USER, _ASSISTANT, _KEY = "zqxasked", "zqxsaid", "zqxkey"
_PARAMETERS = {"type": "object", "properties": {"zqx": {"type": "string"}}, "required": ["zqx"]}
_TOOL = {
    "type": "function",
    "function": {"name": "zqxtool", "description": "zqx", "parameters": _PARAMETERS},
}


def template_form(tokenizer: Any, *, tools: bool = False) -> TemplateForm:
    """The form of the tokenizer's chat template. tools: the template for chats with tools, which a
    tokenizer may define separately."""
    return _form(tokenizer, str(getattr(tokenizer, "chat_template", None)), tools)


@lru_cache(maxsize=16)
def _form(tokenizer: Any, template: str, tools: bool) -> TemplateForm:
    return TemplateForm(tokenizer, template, tools)


def _turns(user: Any, assistant: Any, **more: Any) -> list[dict[str, Any]]:
    """A made-up chat with these contents. more: keys of the assistant message."""
    answer = {"role": "assistant", "content": assistant, **more}
    return [{"role": "user", "content": user}, answer]


class TemplateForm:
    def __init__(self, tokenizer: Any, template: str, tools: bool) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.tools = [_TOOL] if tools else None
        self.stand_ins: dict[Any, str | None] = {}
        """Renderings cached by `chat_proof`, because most rows have one of a few forms."""

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str | None:
        """Render the messages; None if the template does not accept them."""
        try:
            return render_chat(self.tokenizer, messages, **options)
        except TEMPLATE_ERRORS:
            return None

    def fit(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Convert the messages to the form that the template accepts."""
        fitted = [self._fit(dict(message)) for message in messages]
        called = any(one.get("tool_calls") or one["role"] == "tool" for one in fitted)
        if not called or not (self.names_ids or self.writes_result_names):
            return fitted
        named = with_call_ids(fitted, form=self.id_form, names=self.writes_result_names)
        if self.names_ids:
            return named
        # A template that writes complete calls as JSON would write added ids.
        pairs = zip(fitted, named, strict=True)
        return [
            {**own, "name": with_name["name"]} if "name" in with_name else own
            for own, with_name in pairs
        ]

    def fit_tools(self, tools: Sequence[Any] | None) -> tuple[Any, ...] | None:
        """Convert the tools to the form that the template accepts: wrap bare functions in
        `{"type": "function", "function": ...}` if the template needs it."""
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
            decoded = from_json(given)
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
        """Move reasoning to the key that the template reads, if there is one."""
        given = {key: message[key] for key in KEYS if isinstance(message.get(key), str)}
        if not given or any(map(self.names, given)) or len({*given.values()}) > 1:
            return message
        key = next(filter(self.names, KEYS), None)
        if key is None:
            return message
        rest = {name: value for name, value in message.items() if name not in given}
        return {**rest, key: next(iter(given.values()))}

    @cached_property
    def reasoning_key(self) -> str | None:
        """The message key in which the template expects reasoning, if it treats <think> in the
        content as part of the answer (gpt-oss, Kimi K2). None: the content may contain reasoning.
        """
        thought, answer = "Zq7beta", "Zq7gamma"
        inside = f"{THINK[0]}\n{thought}\n{THINK[1]}\n\n{answer}"
        for key in filter(self.template.__contains__, KEYS):
            expected = self.render(_turns("alpha", answer, **{key: thought}))
            found = self.render(_turns("alpha", inside))
            if expected and found is not None and thought in expected and answer in expected:
                return None if "".join(found.split()) == "".join(expected.split()) else key
        return None

    def names(self, key: str) -> bool:
        """Whether the template's source mentions a message key."""
        return bool(re.search(rf"[.'\"]{re.escape(key)}(?!\w)", self.template))

    @cached_property
    def reads_strings(self) -> bool:
        return self._shows(_USER, _ASSISTANT)

    @cached_property
    def reads_parts(self) -> bool:
        """Whether lists of text parts are read rather than printed as a list."""
        user, assistant = ([{"type": "text", "text": t}] for t in (_USER, _ASSISTANT))
        return self._shows(user, assistant)

    def _shows(self, user: Any, assistant: Any) -> bool:
        text = self.render(_turns(user, assistant), tools=self.tools)
        if text is None or _USER not in text or _ASSISTANT not in text:
            return False
        printed = "".join(text.split()).replace("'", '"')
        return '"type":"text"' not in printed

    @cached_property
    def reads_bare_tools(self) -> bool:
        """Whether the template writes the name of a tool that is not wrapped in `function`."""
        user = self._fit({"role": "user", "content": _USER})
        text = self.render([user], tools=[_TOOL["function"]], generation_prompt=True)
        return text is not None and "zqxtool" in text

    @cached_property
    def reads_bare_calls(self) -> bool:
        """Whether the template writes a tool call that is not wrapped in `function`."""
        arguments: Any = {_KEY: _ASSISTANT}
        if not self.reads_argument_objects and self.reads_argument_text:
            arguments = json.dumps(arguments)
        text = self._call_rendered(arguments, bare=True)
        return bool(text and "zqxtool" in text and _ASSISTANT in text)

    @cached_property
    def prints_none(self) -> bool:
        """Whether a tool call's null content is rejected or written as `None`."""
        with_none = self._call_rendered({_KEY: _ASSISTANT}, null=True)
        return with_none is None or "None" in with_none

    @cached_property
    def leaves_out_calls(self) -> bool:
        """Whether a tool call is accepted but omitted, or written so that it cannot be parsed."""
        accepted = self._call_rendered({_KEY: _ASSISTANT}) is not None
        return accepted and not (self.reads_argument_objects or self.reads_argument_text)

    @cached_property
    def reads_argument_objects(self) -> bool:
        text = self._call_rendered({_KEY: _ASSISTANT})
        return bool(text and _KEY in text and _ASSISTANT in text and f"{{'{_KEY}'" not in text)

    @cached_property
    def reads_argument_text(self) -> bool:
        """Whether arguments in JSON text are written unchanged, not encoded a second time."""
        arguments = json.dumps({_KEY: _ASSISTANT})
        text = self._call_rendered(arguments)
        return bool(text and arguments in text)

    @cached_property
    def names_ids(self) -> bool:
        """Whether the template's source mentions the ids of calls or results."""
        return self.names("id") or self.names("tool_call_id")

    @cached_property
    def id_form(self) -> IdForm:
        """The form of call ids that the template accepts or writes itself."""
        text = self._result_rendered("zqxcall01")
        if text is not None and self._result_rendered("call_zqx0123456789") is None:
            return "short"
        return "numbered" if text and "functions.zqxtool:0" in text else "any"

    @cached_property
    def writes_result_names(self) -> bool:
        """Whether the template writes the name of a tool result."""
        return "zqxresult" in (self._result_rendered("zqxcall01") or "")

    def _result_rendered(self, call_id: str) -> str | None:
        function = {"name": "zqxtool", "arguments": {_KEY: _ASSISTANT}}
        call = {"id": call_id, "type": "function", "function": function}
        result = {"role": "tool", "name": "zqxresult", "tool_call_id": call_id, "content": "zqx"}
        chat = [*_turns(_USER, None, tool_calls=[call]), result]
        fitted = [self._fit(message) for message in chat]
        return self.render(fitted, tools=self.tools, generation_prompt=True)

    def _call_rendered(
        self, arguments: Any, *, null: bool = False, bare: bool = False
    ) -> str | None:
        """Render a chat that ends with a tool call. null: its content is null, even if the template
        does not handle that. bare: the call is not wrapped in `function`."""
        function = {"name": "zqxtool", "arguments": arguments}
        call = {"id": "zqxcall01", "type": "function", "function": function}
        if bare:
            call = {"id": "zqxcall01", **function}
        user = _USER if self.reads_strings else [{"type": "text", "text": _USER}]
        content = None if null or not self.prints_none else ""
        return self.render(_turns(user, content, tool_calls=[call]), tools=self.tools)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        turns = [self._fit(message) for message in _turns(_USER, _ASSISTANT)]
        chats = (turns, [*turns, turns[0]])
        framing = "".join(
            self.render(chat, generation_prompt=n > 0) or "" for n, chat in enumerate(chats)
        )
        return ControlTokens(self.tokenizer, framing)
