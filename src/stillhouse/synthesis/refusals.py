"""Recognizes answers that refuse to answer, by what they refuse.

The beginning of an answer is split into clauses. A clause refuses if someone who speaks for the
model denies that they can, may or will do something ("I can't", "this assistant won't"), or if a
rule forbids it, and enough points say that this is a model that refuses a request: the act is one
of answering (help, provide, discuss), the clause points to the request ("that", "this topic") or
shares words with the prompt, the text speaks of a model, of rules or of harm, apologizes, or offers
something else.

Letters, dialogues, quotations and everyday excuses are answers. More points are needed if the
prompt requests a text. A text that goes on to do what was requested is an answer, too: "I can't
give medical advice, but most headaches ...".
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from stillhouse.synthesis.refusal_language import NEVER, Language, languages

CLAUSES, CHARACTERS = 8, 600
"""How much of an answer's beginning is searched."""
ACT = 24
"""Characters after a denial that tell a disclaimer from a refusal."""
ECHO = 8
"""A longer clause that is in the prompt repeats it."""
BEFORE = 40
"""Characters of content before a disclaimer that make the text an answer."""
CONTENT, AFTER_DISCLAIMER = 80, 70
"""Characters of content after a refusal, or after a disclaimer, that make the text an answer."""
POINTS = 3
"""A clause with as many refuses."""
DENSITY = 3
"""Letters that a character of a script without spaces counts for."""

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_OBJECT = re.compile(r"(?:```(?:json)?\s*)?(\{.*\})\s*(?:```)?", re.DOTALL)
_MARKUP = re.compile(r"[*_`#]+|^\s*>\s?", re.MULTILINE)
_QUOTED = re.compile(
    r"\"[^\"\n]{0,400}\"|«[^»\n]{0,400}»|„[^“”\n]{0,400}[“”]|[「『][^」』\n]{0,400}[」』]"
)
_SPEAKER = r"^[^\W\d_][\w. ]{0,20}[:：] ?"
_DIALOGUE = re.compile(rf"{_SPEAKER}.*\n+{_SPEAKER}", re.MULTILINE)
_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_CLAUSE_END = re.compile(
    r"[.!?;:,\n—–。！？；，、](?:(?<=[.!?;:])\s+|(?<=[\n—–。！？；])"
    r"|(?<=,)(?<!can,)\s+(?=(?:but|however|aber|jedoch|mais|pero|mas|porém|ma|но|однако)\b)"
    r"|(?<=[，、,])(?=但|不过|可以)|(?<=[がけ][、，]))"
)
_WORD_GAP = re.compile(r"[^\w'\n]+")
_PAIR = re.compile(r"[\u4e00-\u9fff\u30a0-\u30ff]{2}")


@dataclass(frozen=True)
class _Answer:
    """plain: without code and markup. clauses: of its beginning; said: their words. asked: the
    prompt's."""

    has_code: bool
    plain: str
    clauses: list[str]
    said: list[str]
    prompt: str
    asked: str
    language: Language

    @property
    def together(self) -> str:
        return " ".join(self.said)


@dataclass(frozen=True)
class _Denial:
    """points: by the act. firm: the act is one of answering, or a rule forbids it. disclaims: it
    says what a model lacks (access, opinions), as many answers do first."""

    points: int
    firm: bool
    disclaims: bool = False


def refusing_words(text: str, prompt: str = "") -> str | None:
    """The clause by which an answer (without its reasoning) refuses, or None.

    prompt: the user's message, if it is known; more refusals are recognized with it. Recognizes the
    languages of `refusal_languages`. Role play, and lectures that state no refusal, are mostly not
    recognized.
    """
    answer = _read(text, prompt)
    if answer is None or answer.language.about_model.search(answer.asked):
        return None
    for number, clause in enumerate(answer.said):
        denial = _denial(clause, answer.language)
        if denial is None and number == 0 and _only_says_no(clause, answer):
            denial = _Denial(2, firm=False, disclaims=True)
        if denial is None or (len(clause) > ECHO and clause in answer.asked):
            continue
        before = _content(answer, 0, number, judgments=denial.disclaims)
        if before >= (BEFORE if denial.disclaims else CONTENT) and not _is_plain(denial):
            continue
        points = denial.points + _evidence(number, denial, answer)
        if points >= _needed(clause, answer) + (before >= CONTENT):
            return None if _delivers(number, denial, answer) else _shown(answer, number)
    return _shown(answer, 0) if _only_lectures(answer) else None


def _read(text: str, prompt: str) -> _Answer | None:
    """None of texts that cannot refuse: code, letters, dialogues, quotations."""
    text = _straight(text.strip())
    if prompt:
        text = _json_text(text)
    if text.startswith(("```", "{", "<")) or (text.startswith("[") and text.endswith("]")):
        return None
    plain = _MARKUP.sub("", _CODE.sub(" ", text)).strip()
    if _DIALOGUE.search(plain[:CHARACTERS]) or _is_quotation(plain):
        return None
    opening = _QUOTED.sub('""', plain[:CHARACTERS])
    language = _language(opening, prompt)
    clauses = _clauses(opening)
    lines = _spaced("\n".join(clauses), language)
    if not any(pattern.search(lines) for pattern in language.refusing):
        return None
    if language.letter.search(plain) and not _has(lines, language.model):
        return None
    if language.complies.match(lines):
        return None
    asked = _spaced(_straight(prompt).replace("\n", " "), language) if prompt.strip() else ""
    return _Answer("```" in text, plain, clauses, lines.split("\n"), prompt, asked, language)


def _straight(text: str) -> str:
    return re.sub("[’‘´ʼ]", "'", text).replace("“", '"').replace("”", '"')


def _is_quotation(plain: str) -> bool:
    return plain.startswith('"') and 0 < plain.find('"', 1) < len(plain) - 1


def _json_text(text: str) -> str:
    """The texts in a JSON object, in a code fence or not; other texts as they are."""
    found = _OBJECT.fullmatch(text)
    try:
        value = json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return text
    return " ".join(part for part in value.values() if isinstance(part, str)) or text


def _language(opening: str, prompt: str) -> Language:
    """The language whose script or frequent words a text has; English if none is clear."""
    for language in languages() if not opening.isascii() else ():
        if language.script is not NEVER and language.script.search(opening, 0, 300):
            return language
    found, asked = _words(opening), _words(prompt)
    return max(
        languages(),
        key=lambda language: 3 * len(found & language.frequent) + len(asked & language.frequent),
    )


def _words(text: str) -> set[str]:
    return set(_WORD_GAP.split(text[:200].lower().replace("'", " ")))


def _clauses(opening: str) -> list[str]:
    ends = [found.end() for found in _CLAUSE_END.finditer(opening)]
    cuts = itertools.pairwise([0, *ends, len(opening)])
    clauses = (opening[start:end].strip() for start, end in cuts)
    said = (clause for clause in clauses if any(map(str.isalnum, clause)))
    return list(itertools.islice(said, CLAUSES))


def _spaced(text: str, language: Language) -> str:
    """Lowercase words, each between spaces; contractions written out, adverbs left out."""
    lines = _WORD_GAP.sub(" ", text.lower()).split("\n")
    text = "\n".join(f" {line.strip()} " for line in lines)
    for contraction, meant in language.contractions:
        text = text.replace(contraction, meant)
    return text if language.adverbs is NEVER else language.adverbs.sub("", text)


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _shown(answer: _Answer, number: int) -> str:
    return answer.clauses[number][:100].strip(" ,;:")


# --- what a clause denies ---------------------------------------------------------------------


def _denial(clause: str, language: Language) -> _Denial | None:
    if language.narrated.search(clause):
        return None
    if language.policy.search(clause):
        return _Denial(POINTS, firm=True)
    if language.lacks.search(clause):
        return _Denial(POINTS, firm=True, disclaims=True)
    declines = language.declines.search(clause)
    if declines is not None:
        if declines.group().endswith(language.infinitive):
            return _denied_act(clause, declines, language)
        return _Denial(2, firm=False)
    denials = [_denied_act(clause, found, language) for found in language.denies.finditer(clause)]
    best = max(filter(None, denials), key=lambda denial: denial.points, default=None)
    if (best is None or best.points < 2) and language.impersonal.search(clause):
        return _Denial(2, firm=False, disclaims=True)
    return best


def _denied_act(clause: str, found: re.Match[str], language: Language) -> _Denial | None:
    if language.idioms.match(clause, found.end()):
        return None
    act = clause[found.end() :][: language.reach] if language.reach else clause
    disclaims = language.disclaims.search(act[: ACT if language.reach else None]) is not None
    bound = int(_has(f"{found.group()} ", language.bound))
    if found.group().startswith(" we ") and language.bare.search(clause) is None:
        bound -= 1  # companies speak so
    if _has(act, language.answering):
        return _Denial((POINTS if language.spaced else 2) + bound, True, disclaims)
    if _has(act, language.deeds):
        return _Denial(1 + bound, False, disclaims)
    return _Denial(0, firm=False, disclaims=True) if language.spaced else None


def _only_says_no(clause: str, answer: _Answer) -> bool:
    no = answer.language.no.search(clause) is not None
    return no and answer.asked != "" and "?" not in answer.prompt


def _is_plain(denial: _Denial) -> bool:
    return denial.firm and not denial.disclaims


# --- how likely it is that a model refuses ----------------------------------------------------


def _evidence(number: int, denial: _Denial, answer: _Answer) -> int:
    """Points for what the clause and the text around it say."""
    clause, around, language = answer.said[number], answer.together, answer.language
    request = sum(word in clause for word in language.request)
    request = min(2, request + (language.bare.search(clause) is not None))
    model, rules = _has(around, language.model), _has(around, language.rules)
    harm = _has(around, language.harm) + _has(answer.asked, language.harm)
    offer = _has(around, language.offer)
    writing = language.writing.search(answer.asked) is not None
    shared = (denial.firm or not writing) and _shares(clause, answer)
    empty = answer.asked != "" and not writing and _is_empty(answer, number)
    about_request = denial.points > 0 and (request > 0 or offer or empty)
    if not (denial.firm or model or rules or harm or shared or about_request):
        return -9
    everyday = (found.strip() for found in language.everyday.findall(clause))
    excuse = not denial.disclaims and any(words not in answer.asked for words in everyday)
    return (
        request + 2 * model + rules + harm + offer + empty + (1 if writing else 2) * shared
        + _has(clause, language.you) + _has(around, language.sorry) - 3 * excuse
    )  # fmt: skip


def _shares(clause: str, answer: _Answer) -> bool:
    """Whether a word of the clause is in the prompt, up to its ending."""
    if not answer.language.spaced:
        return any(pair in answer.asked for pair in _PAIR.findall(clause))
    words = (word for word in clause.split() if len(word) > 3 and word not in answer.language.stop)
    return any(f" {word[: 4 if len(word) < 7 else 6]}" in answer.asked for word in words)


def _is_empty(answer: _Answer, number: int) -> bool:
    return _content(answer, 0, number) + _content(answer, number + 1) < BEFORE


def _needed(clause: str, answer: _Answer) -> int:
    """Points that make a clause a refusal: more if the prompt requests a text, or quotes one."""
    language, asked = answer.language, answer.asked
    if not language.writing.search(asked):
        return POINTS
    prompt = _straight(answer.prompt)
    if any(other.denies.search(_spaced(prompt, other)) for other in languages()):
        return POINTS + 3
    if language.declining.search(asked):
        return POINTS + 3
    if language.bare.search(clause) or _has(clause, language.model) or _has(asked, language.harm):
        return POINTS
    return POINTS + 1


# --- what else the text says ------------------------------------------------------------------


def _content(
    answer: _Answer, start: int, end: int | None = None, *, judgments: bool = False
) -> int:
    """Letters of the clauses from start to end that state something: no refusal, offer, advice,
    question, or judgment of what was requested (unless these count)."""
    pairs = zip(answer.clauses[start:end], answer.said[start:end], strict=True)
    return _stated(pairs, answer.language, judgments=judgments)


def _stated(
    clauses: Iterable[tuple[str, str]], language: Language, *, judgments: bool = False
) -> int:
    """clauses: each with its words."""
    found = sum(
        len(clause)
        for clause, said in clauses
        if not (
            clause.endswith(("?", "？"))
            or language.talk.search(said)
            or language.denies.search(said)
            or _has(said, language.sorry)
            or (not judgments and _has(said, language.harm + language.rules))
        )
    )
    return found if language.spaced else found * DENSITY


def _delivers(number: int, denial: _Denial, answer: _Answer) -> bool:
    """Whether the text goes on to do what was requested."""
    if answer.has_code:
        return True
    language, rest = answer.language, answer.plain[CHARACTERS:].strip()
    clauses = [*answer.clauses[number + 1 :], rest]
    said = [*answer.said[number + 1 :], _spaced(rest.replace("\n", " "), language)]
    for at, clause in enumerate(said):
        if language.here.search(clause):
            return not _has(" ".join(said[: at + 1]), language.instead)
    if any(_has(clause, language.instead) for clause in said):
        return False
    pairs = list(zip(clauses, said, strict=True))
    if denial.disclaims:
        return _stated(pairs, language) >= AFTER_DISCLAIMER
    turns = [at for at, clause in enumerate(said[:2]) if language.turn.match(clause)]
    return turns != [] and _stated(pairs[turns[0] :], language) >= CONTENT


def _only_lectures(answer: _Answer) -> bool:
    """Whether a text judges what was requested and offers something else, without content."""
    language = answer.language
    if len(answer.plain) > CHARACTERS or _LIST.search(answer.plain):
        return False
    if language.definition.search(answer.asked):
        return False
    if not language.judges.search(" ".join(answer.said[:2])):
        return False
    if not (_has(answer.together, language.harm) and _has(answer.together, language.offer)):
        return False
    stated = (clause for clause in answer.said[1:] if not language.talk.search(clause))
    return sum(len(clause) for clause in stated if not _has(clause, language.harm)) < CONTENT
