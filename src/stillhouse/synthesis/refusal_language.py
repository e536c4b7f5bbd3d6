"""How a language refuses: patterns and lists of words, read from `refusal_languages/*.toml`.

Patterns match one clause: lowercase words, a space before and after each, no punctuation. Only
`script` and `letter` match the text itself. A word of a list stands for all words that begin with
it, and with `$` at its end only for itself. `<name>` in a pattern is the pattern of that name in
the table `parts`.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

NEVER = re.compile(r"(?!)")
NAMES = (
    "english", "german", "french", "spanish", "portuguese", "italian", "russian", "japanese",
    "chinese",
)  # fmt: skip
"""Japanese comes before Chinese, whose characters it uses."""


@dataclass(frozen=True)
class Language:
    # What a model says when it refuses.
    denies: re.Pattern[str]  # "I can't", "I won't", "I'm not allowed to"
    declines: re.Pattern[str] = NEVER  # "I decline"
    lacks: re.Pattern[str] = NEVER  # "I don't have access"
    policy: re.Pattern[str] = NEVER  # "it is against my guidelines", "count me out"
    impersonal: re.Pattern[str] = NEVER  # "nobody can know"; weaker than the others
    no: re.Pattern[str] = NEVER  # "No." before anything else
    judges: re.Pattern[str] = NEVER  # "it is illegal"

    # What it refuses.
    answering: tuple[str, ...] = ()  # acts of models: help, provide, discuss
    deeds: tuple[str, ...] = ()  # acts of models and people: give, make, see
    reach: int = 0  # characters after the denial in which the act stands; 0: the complete clause
    infinitive: str = ""  # ends a denial that an act follows: " to"
    bare: re.Pattern[str] = NEVER  # an act without an object, or with a pronoun
    request: tuple[str, ...] = ()  # what it is about: this, question, advice
    disclaims: re.Pattern[str] = NEVER  # an act that answers often disclaim first: see, predict

    # What makes a refusal likely.
    bound: tuple[str, ...] = ()  # denials of what is allowed or wanted
    model: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    harm: tuple[str, ...] = ()
    offer: tuple[str, ...] = ()
    sorry: tuple[str, ...] = ()
    you: tuple[str, ...] = ()

    # What makes an answer likely.
    idioms: re.Pattern[str] = NEVER  # after a denial: "wait to see you"
    everyday: re.Pattern[str] = NEVER  # "tonight", "my keys"
    narrated: re.Pattern[str] = NEVER  # "she said"
    letter: re.Pattern[str] = NEVER  # "Dear ...", "Best regards"
    complies: re.Pattern[str] = NEVER  # "Sure"
    here: re.Pattern[str] = NEVER  # "here is"
    turn: re.Pattern[str] = NEVER  # "but"
    instead: tuple[str, ...] = ()  # what comes is not what was requested
    talk: re.Pattern[str] = NEVER  # offers, advice, reasons: no content

    # What the prompt says.
    writing: re.Pattern[str] = NEVER  # requests a text
    declining: re.Pattern[str] = NEVER  # ... that declines
    definition: re.Pattern[str] = NEVER  # asks what something is, or whether it is right
    about_model: re.Pattern[str] = NEVER  # asks what the model is or does

    # The language itself.
    spaced: bool = True  # words have spaces between them
    script: re.Pattern[str] = NEVER
    frequent: frozenset[str] = frozenset()
    stop: frozenset[str] = frozenset()  # words that a refusal and any prompt may share
    contractions: tuple[tuple[str, str], ...] = ()
    adverbs: re.Pattern[str] = NEVER  # left out

    @cached_property
    def refusing(self) -> tuple[re.Pattern[str], ...]:
        """One of them matches in every refusal."""
        patterns = (
            self.denies, self.policy, self.lacks, self.declines, self.impersonal, self.no,
            self.judges,
        )  # fmt: skip
        return tuple(pattern for pattern in patterns if pattern is not NEVER)


@cache
def languages() -> tuple[Language, ...]:
    folder = files("stillhouse.synthesis").joinpath("refusal_languages")
    texts = (folder.joinpath(f"{name}.toml").read_text(encoding="utf-8") for name in NAMES)
    return tuple(_language(tomllib.loads(text)) for text in texts)


def _language(read: dict[str, Any]) -> Language:
    parts: dict[str, str] = read.pop("parts", {})
    spaced = read.get("spaced", True)
    values: dict[str, Any] = {}
    for name, value in read.items():
        if name == "contractions":
            values[name] = tuple((written, meant) for written, meant in value)
        elif isinstance(value, list):
            end = "(?= |$)" if name == "denies" and spaced else ""
            values[name] = re.compile(_either(value, parts) + end, re.MULTILINE)
        elif name in ("script", "adverbs"):
            values[name] = re.compile(value)
        elif name in ("frequent", "stop"):
            values[name] = frozenset(_words(value))
        elif isinstance(value, str) and name != "infinitive":
            values[name] = tuple(
                (" " if spaced else "") + word.replace("$", " ") for word in _words(value)
            )
        else:
            values[name] = value
    return Language(**values)


def _either(patterns: list[str], parts: dict[str, str]) -> str:
    """One pattern for all. If all begin with a space, it does, which makes the search fast."""
    found = []
    for pattern in patterns:
        while (filled := re.sub(r"<(\w+)>", lambda part: parts[part[1]], pattern)) != pattern:
            pattern = filled
        found.append(f" (?<=^ ){pattern[2:]}" if pattern.startswith("^ ") else pattern)
    if all(pattern.startswith(" ") and pattern[1:2] not in "?*+{" for pattern in found):
        return " (?:" + "|".join(pattern[1:] for pattern in found) + ")"
    return "(?:" + "|".join(found) + ")"


def _words(listed: str) -> list[str]:
    return [word.strip() for line in listed.splitlines() for word in line.split("|") if word]
