"""Finds the text that a chat template writes around messages, by rendering made-up chats.

The frames of two templates turn a chat rendered by one into the rendering of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from stillhouse.data.template_form import template_form

_SYSTEM, _USER, _ANSWER, _AGAIN, _LAST = "zqxsystem", "zqxuser", "zqxanswer", "zqxagain", "zqxlast"


class Part(NamedTuple):
    """A part of a rendered chat. role: of the message that it is the content of; None: a frame."""

    text: str
    role: str | None


@dataclass(frozen=True)
class ChatFrames:
    """The frames of chats that have an optional system message, then alternating user and
    assistant turns.

    start: before the first user content. system: before and after a system message's content; None
    if the template does not accept one. answer: between a user content and the answer. user:
    between an answer and the next user content. end: after the last answer.
    """

    tokenizer: Any
    start: str
    system: tuple[str, str] | None
    answer: str
    user: str
    end: str

    def parse(self, text: str) -> list[Part] | None:
        """Split a rendered chat, which may be cut off inside its last content, into parts.

        Returns None if the template does not render the parts' contents as this text.
        """
        parts: list[Part] = []
        if text.startswith(self.start):
            parts.append(Part(self.start, None))
        elif self.system is not None and text.startswith(self.system[0]):
            before, after = self.system
            content, found, _ = text[len(before) :].partition(after)
            if not found:
                return None
            parts += [Part(before, None), Part(content, "system"), Part(after, None)]
        else:
            return None
        rest = text[sum(len(part.text) for part in parts) :]
        role = "user"
        frames: tuple[str, ...] = (self.answer,)
        while True:
            places = [(rest.find(frame), frame) for frame in frames if frame and frame in rest]
            if not places:
                parts.append(Part(rest, role))
                break
            at, frame = min(places, key=lambda place: (place[0], -len(place[1])))
            parts += [Part(rest[:at], role), Part(frame, None)]
            rest = rest[at + len(frame) :]
            if frame == self.end and not rest:
                break
            role = "assistant" if role == "user" else "user"
            frames = (self.user, self.end) if role == "assistant" else (self.answer,)
        return parts if self._renders(parts, text) else None

    def write(self, parts: Sequence[Part]) -> list[Part] | None:
        """Render the same contents with this template; None if it cannot."""
        contents = [part for part in parts if part.role is not None]
        found: list[Part] = []
        if contents[0].role == "system":
            if self.system is None:
                return None
            found += [Part(self.system[0], None), contents[0], Part(self.system[1], None)]
            contents = contents[1:]
        else:
            found.append(Part(self.start, None))
        for part in contents:
            found += [part, Part(self.answer if part.role == "user" else self.user, None)]
        found.pop()
        if parts[-1].role is None:  # the chat is not cut off
            found.append(Part(self.end, None))
        return found if self._renders(found, "".join(part.text for part in found)) else None

    def _renders(self, parts: Sequence[Part], text: str) -> bool:
        """Whether the template's rendering of these contents begins with the text."""
        messages = [
            {"role": part.role, "content": part.text} for part in parts if part.role is not None
        ]
        form = template_form(self.tokenizer)
        whole = form.render(form.fit(messages))
        # A template may strip the space at which a content was cut off.
        cut_off = parts[-1].role is not None
        return whole is not None and whole.startswith(text.rstrip() if cut_off else text)


def chat_frames(tokenizer: Any) -> ChatFrames | None:
    """The frames of the tokenizer's chat template.

    None if there is no template, if it does not write the contents in order, or if it writes turns
    differently later in a chat.
    """
    return _frames(tokenizer, str(getattr(tokenizer, "chat_template", None) or ""))


@lru_cache(maxsize=16)
def _frames(tokenizer: Any, template: str) -> ChatFrames | None:
    if not template:
        return None
    turns = [("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN), ("assistant", _LAST)]
    between = _between(tokenizer, turns)
    if between is None or between[1] != between[3]:
        return None
    start, answer, user, _, end = between
    system = None
    led = _between(tokenizer, [("system", _SYSTEM), *turns])
    if led is not None and led[2:] == between[1:]:
        system = (led[0], led[1])
    return ChatFrames(tokenizer, start, system, answer, user, end)


def _between(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> list[str] | None:
    """The text that the template writes before, between, and after these contents."""
    form = template_form(tokenizer)
    messages = [{"role": role, "content": content} for role, content in turns]
    text = form.render(form.fit(messages)) or ""
    found = []
    for _, content in turns:
        before, there, text = text.partition(content)
        if not there:
            return None
        found.append(before)
    return [*found, text]
