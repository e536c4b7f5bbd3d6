"""Text of users, models and files inside Markdown: it is escaped, so that it is shown literally."""

from __future__ import annotations

import re

from stillhouse.terminal import visible

_SYNTAX = re.compile(r"[\\`*\[\]<>|~]|(?<![^\W_])_|_(?![^\W_])")
"""An underscore between letters or digits is none."""


def inert(text: str) -> str:
    """The text in one line, so that neither Markdown nor HTML reads anything in it."""
    line = " ".join(visible(text).split())
    return _SYNTAX.sub(lambda found: f"\\{found[0]}", line.replace("&", "&amp;"))


def fenced(text: str, language: str) -> str:
    """A code block, whose fence is longer than any row of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text).rstrip()}\n{fence}"
