"""API keys: read from the environment, and removed, in any spelling, from text that a server
returned."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from html import escape
from urllib.parse import quote

from stillhouse.errors import EndpointError

SHORTEST = 8
"""Length from which a key is removed in all spellings. Shorter ones are placeholders such as `none`
and `EMPTY`, which answers can contain."""
_PREFIX = 12
"""Length from which the beginning of a key is removed too, since servers truncate messages."""
SHOWN = "[key]"
_ESCAPES = "\\%&"
"""The characters with which every spelling except the plain one begins."""


def api_key(key_env: str | None, *, where: str, setting: str) -> str | None:
    """Read an API key from the environment variable `key_env`; None if the server needs none.

    where: the endpoint. setting: the recipe key that names the variable. Raises EndpointError:
    the variable is not set, or its value cannot be a key.
    """
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {key_env} is not set; it should contain the endpoint's key",
            where=where,
            fix=f"export {key_env}=..., or remove {setting} if the server needs no key",
        )
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(
            f"the environment variable {key_env} contains characters that an API key cannot have",
            where=where,
            fix="copy the key again, without typographic quotes, ellipses, or line breaks",
        )
    return key


def redacted(text: str, key: str | None) -> str:
    """Replace the key or its beginning with `[key]`, even where it is escaped for JSON, a URL, or
    HTML. A key of fewer than SHORTEST characters is replaced only in its plain spelling."""
    if not key:
        return text
    if len(key) < SHORTEST:
        return text.replace(key, SHOWN)
    if key[:_PREFIX] not in text and not any(sign in text for sign in _ESCAPES):
        return text  # the usual case: without escapes, there is only the plain spelling
    start, following = _patterns(key)
    parts, done = [], 0
    for found in start.finditer(text):
        if found.start() < done:
            continue
        end = found.end()
        for spelling in following:
            further = spelling.match(text, end)
            if further is None:
                break
            end = further.end()
        parts += [text[done : found.start()], SHOWN]
        done = end
    return "".join([*parts, text[done:]])


def holds_key(text: str, key: str | None) -> bool:
    """Whether `redacted` would change the text, for a key of SHORTEST characters or more."""
    return key is not None and len(key) >= SHORTEST and redacted(text, key) != text


@lru_cache(maxsize=16)
def _patterns(key: str) -> tuple[re.Pattern[str], list[re.Pattern[str]]]:
    """Patterns of the beginning of a key, and of each following character."""
    spellings = [_spellings(character) for character in key]
    return re.compile("".join(spellings[:_PREFIX])), list(map(re.compile, spellings[_PREFIX:]))


def _spellings(character: str) -> str:
    """A pattern of every spelling of the character."""
    code = f"{ord(character):04x}"
    either = "".join(f"[{digit}{digit.upper()}]" for digit in code)
    short = either.removeprefix("[00][00]")
    ways = {
        re.escape(character),
        rf"\\+{re.escape(character)}",
        rf"\\+u{either}",
        rf"\\+x{short}",
        re.escape(quote(character, safe="")),
        f"%(?:25)*{short}",
        re.escape(escape(character)),
        f"&(?:amp;)*#0*{ord(character)};",
        f"&(?:amp;)*#[xX]0*{short};",
    }
    return f"(?:{'|'.join(sorted(ways, key=len, reverse=True))})"
