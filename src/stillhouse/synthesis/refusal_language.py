"""Classes of words that a language uses to refuse or to answer, from `refusal_languages/*.toml`.

A class is a list of patterns or of words. It is matched against one clause, which consists of
lowercase words with a space before and after each, without punctuation. A word in a list matches
all words that begin with it or, if it ends with `$`, only itself. `<name>` in a pattern stands for
the pattern of that name in the table `parts`.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

NAMES = (
    "english", "german", "french", "spanish", "portuguese", "italian", "russian", "japanese",
    "chinese",
)  # fmt: skip
"""Languages with a file. Japanese comes before Chinese, whose characters it uses."""
CLAUSES = 8
"""Number of clauses of a text that are used."""

_NEVER = re.compile(r"(?!)")
_CLAUSE_END = re.compile(
    r"[.!?;:,\n—–。！？；，、](?:(?<=[.!?;:])\s+|(?<=[\n—–。！？；])"
    r"|(?<=,)(?<!can,)\s+(?=(?:but|however|aber|jedoch|mais|pero|mas|porém|ma|но|однако)\b)"
    r"|(?<=[，、,])(?=但|不过|可以)|(?<=[がけ][、，]))"
)
_WORD_GAP = re.compile(r"[^\w'\n]+")


@dataclass(frozen=True)
class Language:
    """How a language refuses and answers.

    classes: patterns by name. script: matches characters that only this language uses. frequent:
    words that distinguish it from the other languages. contractions: with their written-out form.
    adverbs: words to leave out.
    """

    classes: tuple[tuple[str, re.Pattern[str]], ...]
    script: re.Pattern[str]
    frequent: frozenset[str]
    contractions: tuple[tuple[str, str], ...]
    adverbs: re.Pattern[str]


@cache
def languages() -> tuple[Language, ...]:
    folder = files("stillhouse.synthesis").joinpath("refusal_languages")
    texts = (folder.joinpath(f"{name}.toml").read_text(encoding="utf-8") for name in NAMES)
    return tuple(_language(tomllib.loads(text)) for text in texts)


def language_of(text: str, prompt: str) -> Language:
    """The language of a text, by its script or frequent words; English if none is clear."""
    for language in languages() if not text.isascii() else ():
        if language.script.search(text, 0, 300):
            return language
    found, asked = _words(text), _words(prompt)
    return max(
        languages(),
        key=lambda language: 3 * len(found & language.frequent) + len(asked & language.frequent),
    )


def _words(text: str) -> set[str]:
    return set(_WORD_GAP.split(text[:200].lower().replace("'", " ")))


def clauses(text: str) -> list[str]:
    """The first CLAUSES clauses that contain letters or digits."""
    ends = [found.end() for found in _CLAUSE_END.finditer(text)]
    cuts = itertools.pairwise([0, *ends, len(text)])
    found = (text[start:end].strip() for start, end in cuts)
    said = (clause for clause in found if any(map(str.isalnum, clause)))
    return list(itertools.islice(said, CLAUSES))


def spaced(text: str, language: Language) -> str:
    """Convert a text to lowercase words between spaces, with contractions written out and adverbs
    left out."""
    text = f" {_WORD_GAP.sub(' ', text.lower()).strip()} "
    for contraction, meant in language.contractions:
        text = text.replace(contraction, meant)
    return language.adverbs.sub("", text)


def _language(read: dict[str, Any]) -> Language:
    parts: dict[str, str] = read.pop("parts", {})
    has_spaces = read.pop("spaced", True)
    script, adverbs = (read.pop(name, None) for name in ("script", "adverbs"))
    frequent = frozenset(_listed(read.pop("frequent", "")))
    contractions = tuple((written, meant) for written, meant in read.pop("contractions", []))
    classes = {}
    for name, value in read.items():
        if isinstance(value, str):
            start = " " if has_spaces else ""
            words = (re.escape(word).replace(r"\$", " ") for word in _listed(value))
            classes[name] = re.compile(f"{start}(?:{'|'.join(words)})")
        else:
            end = "(?= |$)" if name == "denies" and has_spaces else ""
            classes[name] = re.compile(_either(value, parts) + end)
    return Language(
        classes=tuple(classes.items()),
        script=re.compile(script) if script else _NEVER,
        frequent=frequent,
        contractions=contractions,
        adverbs=re.compile(adverbs) if adverbs else _NEVER,
    )


def _either(patterns: list[str], parts: dict[str, str]) -> str:
    """Join patterns into one. If all begin with a space, it does too, which makes searches fast."""
    found = []
    for pattern in patterns:
        while (filled := re.sub(r"<(\w+)>", lambda part: parts[part[1]], pattern)) != pattern:
            pattern = filled
        found.append(f" (?<=^ ){pattern[2:]}" if pattern.startswith("^ ") else pattern)
    if all(pattern.startswith(" ") and pattern[1:2] not in "?*+{" for pattern in found):
        return " (?:" + "|".join(pattern[1:] for pattern in found) + ")"
    return "(?:" + "|".join(found) + ")"


def _listed(text: str) -> list[str]:
    return [word.strip() for line in text.splitlines() for word in line.split("|") if word]
