"""Renders chats with a tokenizer's chat template, independently of the current date.

Some templates write the current date (Llama 3.2, Mistral Small, gpt-oss). Training text, stored
signals, and a teacher's answers must not depend on the day they were made, so a fixed date is used.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

DATE = datetime.datetime(2024, 7, 26)
"""The date that Llama 3's templates fall back to."""
TEMPLATE_ERRORS = (TemplateError, AttributeError, LookupError, TypeError, ValueError)
"""The exceptions that a template can raise for messages that it does not accept."""

_LETTERS = "aAbBcCdDeFfgGhHIjkmMpPrRSTuUVwWxXyYzZ"
_DIRECTIVES = [f"%{sign}{letter}" for sign in ("-", "") for letter in _LETTERS] + ["%%"]
_REPLACED = "".join(f"|replace({one!r}, {DATE.strftime(one)!r})" for one in _DIRECTIVES)
# The macro shadows the function of that name that transformers passes to templates. The empty
# expression keeps a newline at the beginning of the template.
_FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + _REPLACED + " }}{% endmacro %}{{ '' }}"


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    generation_prompt: bool = False,
) -> str:
    """Render the chat as text. Raises whatever the template raises: see `TEMPLATE_ERRORS`."""
    options = {}
    if writes_date(tokenizer):
        options["chat_template"] = _FIXED_DATE + tokenizer.get_chat_template(tools=tools)
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=None if tools is None else list(tools),
        add_generation_prompt=generation_prompt,
        tokenize=False,
        **options,
    )
    return str(text)


def writes_date(tokenizer: Any) -> bool:
    """Whether the chat template uses the current date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))
