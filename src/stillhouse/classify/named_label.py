"""Finds the label that an answer names, and never guesses if the answer names none or several.

An answer names a label if it is the label, apart from case, markup, and surrounding punctuation; if
it states the label ("Label: card", JSON with a key `label`); if it begins with the label and then
explains it; or if it contains exactly one label. A label does not count if it is negated ("not
spam"), part of a quotation, in a question, or part of a longer word (`card` in `card-arrival`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import regex

from stillhouse.classify.label_prompts import LabelPrompt
from stillhouse.data.words import bare, normalized, whole_words, words
from stillhouse.synthesis.filters import unfenced

Phrases = Mapping[str, set[int]]
"""Normalized spellings of labels, each with the numbers of the labels that it matches."""

FEWEST_WORDS = 4
"""Minimum number of words in an explanation that mentions another label. With fewer words, it is
unclear which of the labels is meant."""
_KEYS = (
    "label|category|class|classification|answer|topic|intent|sentiment|prediction|output|verdict"
)
_KEY = re.compile(rf"(?:\w+_)?(?:{_KEYS})(?:_\w+)?", re.IGNORECASE)
_DECLARED = re.compile(
    rf"\b(?:{_KEYS})\b(?: is| would be| should be)? *(?:[:=]|(?<= is )|(?<=d be )) *(.+)"
)
_EXPLAINED = re.compile(
    r"\s*(?:[.!;](?=\s|$)|\n|, (?=because|since|as\b|due|given|which|the|this|it)"
    r"| (?=because|since|due to)| [-–—(]|: (?!no\b|not\b|none|false|\d)(?=\S+ \S+ ))"
)
"""The separator between a label and its explanation."""
_RECONSIDERED = re.compile(r"\b(?:or|wait|actually|alternatively|maybe|perhaps|also|correction)\b")
_NONE = re.compile(
    r"(?:none|neither|nothing|unknown|n/a|unclear|undetermined|not (?:applicable|sure|clear)"
    r"|no (?:label|category|class|topic)|the text is not)\b"
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not(?! only| just)|no(?! doubt)|non|never|neither|nor|without|cannot|unable|unlikely"
    r"|except|excluding|lacks?|rather than|instead of|other than|anything but|far from|unlike"
    r"|kein\w*|nicht|weder|pas|aucune?|ni|nem|não|niet|geen|inte|ikke|nie|không|chẳng|bukan|tidak"
    r"|ни|ані|δεν|όχι|ούτε|לא|אינו|אינה|אין|ليست?|غير|لا|لم|لن)|n't)\b"
    r"(?:(?! but )[^,;:.!?،؛؟。、।\n]){0,40}$"
    # In Russian, "не" negates only the next word, apart from words such as "is" and "about".
    r"|\bне(?: (?:е|є|является|относится|похоже|считается|это|в|к|о|про|на|категори\w*))*\s*$"
    r"|(?:不是|并非|不属于|并不|非|没有|不|ไม่|ไม่ใช่|มิใช่)\s*$"
)
_DENIED_AFTER = re.compile(
    r" (?:is|was|are|does|do|did|would|can|could|will|should|seems?|may|might)(?: not|n't| never)\b"
    r"|\s*[:=?]\s*(?:no|false|0)\b|\s*(?:では|じゃ)(?:ない|ありません)|이?가? ?아니"
    # Negations in Hindi, Urdu, Persian, Bengali, Tamil, and Turkish, which follow the word.
    r"|[^,;:.!?،؛؟。、।\n]{0,12}?\s(?:नहीं|नही|نہیں|نیست|নয়|নয়|না|இல்லை|அல்ல|değil)(?!\w)"
)
_QUOTED = re.compile(
    r"\"[^\"\n]*\"|“[^”\n]*”|„[^“”\n]*[“”]|«[^»\n]*»|「[^」\n]*」|(?<!\w)['‘][^'’\n]*['’](?!\w)"
)
_SEPARATORS = re.compile(r"[\s_-]+")
_MARKUP = re.compile(
    r"[*#`]+|</?\w+>|\\boxed|\\text|(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)|^\s*>"
    r"|(?<=[가-힣])(?:입니다|이에요|예요)(?!\w)",  # the Korean "is", a suffix of the noun
    re.M,
)
# A word may end in a combining mark, which \w of `re` does not match.
_JOINED_BEFORE = regex.compile(r"[\w\p{M}][-‐‑'’./\\@]$")
_JOINED_AFTER = regex.compile(r"[-‐‑'’./\\@]\w")


def named_label(text: str, prompt: LabelPrompt) -> int | None:
    """The number of the label that an answer names; None if it names none or several.

    text: the answer without its reasoning.
    """
    ways = tuple(
        (label, phrase, prompt.answer_for(label)) for label, phrase in prompt.labels.items()
    )
    exact, variants = _phrases(ways)
    answer = _value(unfenced(text))
    for known in (exact, variants):
        if len(known.get(bare(answer), ())) == 1:
            return _one(known[bare(answer)])
    plain = _MARKUP.sub("", normalized_lines(answer))
    stated = [_leading(part, variants) for part in (plain, *_DECLARED.findall(plain))]
    named = {number for number in stated if number is not None}
    if named:
        return _one(named)
    if any(_NONE.match(part) for part in (plain, *_DECLARED.findall(plain))):
        return None
    return _one({number for numbers in _mentioned(plain, variants) for number in numbers})


def _one(numbers: set[int]) -> int | None:
    return next(iter(numbers)) if len(numbers) == 1 else None


def normalized_lines(text: str) -> str:
    """Apply `normalized` to each line, straighten apostrophes, and drop empty lines."""
    lines = (normalized(line).replace("’", "'") for line in text.splitlines())
    return "\n".join(line for line in lines if line)


@lru_cache(maxsize=8)
def _phrases(ways: tuple[tuple[str, ...], ...]) -> tuple[Phrases, Phrases]:
    """The labels' spellings as they are, and also with other word separators (`card arrival` for
    `card_arrival`). ways: each label's spellings."""
    exact: dict[str, set[int]] = {}
    variants: dict[str, set[int]] = {}
    for number, of_label in enumerate(ways):
        for way in set(map(bare, of_label)) - {""}:
            exact.setdefault(way, set()).add(number)
            for variant in {way, *(_SEPARATORS.sub(mark, way) for mark in " -_")}:
                variants.setdefault(variant, set()).add(number)
    return exact, variants


def _value(text: str) -> str:
    """The label in a JSON answer; the text itself if it is not JSON."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, dict):
        keyed = [one for key, one in value.items() if _KEY.fullmatch(key)]
        # JSON's true and false may be labels.
        keyed = [json.dumps(one) if isinstance(one, bool) else one for one in keyed]
        true = [key for key, one in value.items() if one is True]
        value = (keyed or true or list(value.values()))[:2]
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _leading(text: str, phrases: Phrases) -> int | None:
    """The label that is the entire text, or that the text begins with and then explains."""
    for end in (found.start() for found in _EXPLAINED.finditer(text)):
        numbers = phrases.get(bare(text[:end]), set())
        if len(numbers) == 1:
            return None if _is_doubtful(text[end:], phrases, numbers) else _one(numbers)
    return _one(phrases.get(bare(text), set()))


def _is_doubtful(explanation: str, phrases: Phrases, numbers: set[int]) -> bool:
    """Whether the explanation mentions a different label, and is very short or reconsiders."""
    others = any(other != numbers for other in _mentioned(explanation, phrases))
    few = len(words(explanation)) < FEWEST_WORDS
    return others and (few or _RECONSIDERED.search(explanation) is not None)


def _mentioned(text: str, phrases: Phrases) -> Iterator[set[int]]:
    """Yield the labels in the text that are neither negated nor in a question. If one label is part
    of another, only the longer one counts."""
    shown = _QUOTED.sub(lambda found: _unquoted(found.group(), phrases), text)
    left = shown
    for way in sorted(filter(left.__contains__, phrases), key=len, reverse=True):
        spans = [found.span() for found in whole_words(way).finditer(left)]
        for start, end in spans:
            before, after = shown[:start], shown[end:]
            if not _stands_alone(way, before, after):
                continue
            left = left[:start] + "\n" * (end - start) + left[end:]
            denied = _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after)
            if not denied and not re.match(r"[^.!?\n]*\?", after):
                yield phrases[way]


def _stands_alone(way: str, before: str, after: str) -> bool:
    """Whether this spelling is a label here, not an article, a symbol, or part of a longer word or
    number."""
    if not words(way) or _JOINED_BEFORE.search(before) or _JOINED_AFTER.match(after):
        return False
    if way[0].isdigit():
        return not before.endswith(("-", "−", ".", ","))
    letter = len(way) == 1 and way.isascii()
    return not letter or (not words(before) and after.startswith((")", ".", ":")))


def _unquoted(quotation: str, phrases: Phrases) -> str:
    """The quotation's content if that is a label; otherwise, an ellipsis."""
    inside = quotation[1:-1]
    return f" {inside} " if bare(inside) in phrases else " … "
