"""Keeps strings of control tokens in text, such as `<|im_end|>`, from being read as tokens.

A tokenizer matches the strings of its special tokens anywhere, so a user's text could end its own
turn. Such strings are hidden while a chat is rendered: each is replaced by one character of
Unicode's private use area. Afterwards the text around them is encoded as plain text, while the
control tokens that the chat template wrote stay tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.data.reasoning import SPOKEN

_HIDDEN_END = 0x10FFFE
"""End (exclusive) of the characters that replace control tokens while a chat is rendered."""

CONTROL_TEXT = "strings of control tokens are read as text (data.control_tokens)"
REASONING_MARK = re.compile(rf"</?thinking>|{SPOKEN.pattern}")


@dataclass(frozen=True)
class Piece:
    """Consecutive characters of a row, either all supervised or none.

    plain: strings of special tokens in it are text.
    """

    text: str
    supervised: bool
    plain: bool = False


class ControlTokens:
    """The tokens of a tokenizer that strings in text must not become.

    These are its special tokens, and the other added tokens that the chat template uses to write
    turns, such as DeepSeek's `<｜User｜>`; but not reasoning tags that are ordinary tokens.
    framing: a rendered chat without tools or reasoning.
    """

    def __init__(self, tokenizer: Any, framing: str = "") -> None:
        added = {str(t): t for t in tokenizer.added_tokens_decoder.values() if str(t).strip()}
        longest_first = sorted(added, key=len, reverse=True)
        self.unspecial = [
            text
            for text in longest_first
            if not added[text].special and text in framing and not REASONING_MARK.fullmatch(text)
        ]
        self.strings = [
            text for text in longest_first if added[text].special or text in self.unspecial
        ]
        self._pattern = _any_of(self.strings)
        self._spoken = _any_of([s for s in self.strings if not REASONING_MARK.fullmatch(s)])
        self._edges = [text for text in self.strings if text != tokenizer.unk_token]
        self._hidden = _HIDDEN_END - max(1, len(self.strings))
        """The first placeholder."""
        self._placeholders = re.compile(f"[{chr(self._hidden)}-{chr(_HIDDEN_END - 1)}]")
        # A token may absorb adjacent whitespace, so a piece ends after the whitespace.
        self._tokens = re.compile(
            "|".join(
                (r"\s*" if added[text].lstrip else "")
                + re.escape(text)
                + (r"\s*" if added[text].rstrip else "")
                for text in longest_first
            )
            or "(?!)"
        )

    def found(self, value: Any, *, spoken: bool = False) -> str | None:
        """Return the first string of a control token in a text or nested value; see `hide`."""
        if isinstance(value, str):
            match = (self._spoken if spoken else self._pattern).search(value)
            return match[0] if match else None
        items = (*value, *value.values()) if isinstance(value, Mapping) else value
        if not isinstance(value, (Mapping, list, tuple)):
            return None
        return next(filter(None, (self.found(item, spoken=spoken) for item in items)), None)

    def at_an_end(self, text: str) -> str | None:
        """Return the control token that a text begins or ends with, as a rendered chat would."""
        bare = text.strip()
        return next((s for s in self._edges if bare.startswith(s) or bare.endswith(s)), None)

    def hide(self, value: Any, *, spoken: bool = False) -> Any:
        """Replace control tokens by placeholders in all strings of a value.

        spoken: the value is an assistant message, whose reasoning tags stay tokens.
        """
        if isinstance(value, str):
            pattern = self._spoken if spoken else self._pattern
            return pattern.sub(lambda m: chr(self._hidden + self.strings.index(m[0])), value)
        if isinstance(value, Mapping):
            hidden = (self.hide(list(item), spoken=spoken) for item in value.items())
            return dict(map(tuple, hidden))
        if isinstance(value, (list, tuple)):
            return [self.hide(item, spoken=spoken) for item in value]
        return value

    def hide_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """Replace control tokens by placeholders; None if the messages contain none."""
        pairs = [(message, message["role"] == "assistant") for message in messages]
        if not any(self.found(message, spoken=by) for message, by in pairs):
            return None
        return [self.hide(message, spoken=by) for message, by in pairs]

    def reveal(self, text: str) -> str:
        return self._placeholders.sub(lambda m: self.strings[ord(m[0]) - self._hidden], text)

    def divide(self, piece: Piece) -> Iterator[Piece]:
        """Split a piece so that its placeholders are in plain pieces, revealed as text.

        A plain piece extends to the nearest tokens of the template, so that it is encoded as one
        continuous text.
        """
        done = 0
        for start, end in _between(self._tokens, piece.text):
            if self._placeholders.search(piece.text, start, end):
                if start > done:
                    yield Piece(piece.text[done:start], piece.supervised)
                yield from self.plain(self.reveal(piece.text[start:end]), piece.supervised)
                done = end
        if done < len(piece.text):
            yield Piece(piece.text[done:], piece.supervised)

    def plain(self, text: str, supervised: bool) -> Iterator[Piece]:
        """Yield a text as plain pieces. `split_special_tokens` splits only special tokens, so the
        text is cut inside the string of any other control token."""
        done = 0
        for match in _any_of(self.unspecial).finditer(text):
            yield Piece(text[done : match.start() + 1], supervised, True)
            done = match.start() + 1
        yield Piece(text[done:], supervised, True)


def _any_of(strings: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, strings)) or "(?!)")


def _between(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield the bounds of each part of a text between the matches of a pattern."""
    start = 0
    for match in pattern.finditer(text):
        yield start, match.start()
        start = match.end()
    yield start, len(text)
