"""Escapes text from users, models, and files for Markdown, so that it is shown literally."""

from __future__ import annotations

import re

from stillhouse.terminal import visible

_SYNTAX = re.compile(r"[\\`*\[\]<>|~]|(?<![^\W_])_|_(?![^\W_])")
"""Special characters. An underscore between letters or digits is not special."""


def inert(text: str) -> str:
    """Put the text on one line, with Markdown and HTML escaped."""
    line = " ".join(visible(text).split())
    return _SYNTAX.sub(lambda found: f"\\{found[0]}", line.replace("&", "&amp;"))


def fenced(text: str, language: str) -> str:
    """Make a code block whose fence is longer than any run of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text).rstrip()}\n{fence}"
