"""Recognizes refusals by logistic regression on features of the answer and the prompt.

The weights are in `refusal_weights.npz`; `python -m bench.train_refusals` trains them on the
examples in `bench/refusal_examples/`. An answer is a refusal if w·x + b > 0, where x are its
features, w = scale·q with integers q, and b is the bias.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np

from stillhouse.synthesis.refusal_language import Language, clauses, language_of, spaced

BUCKETS = 1 << 20
HEAD, TAIL, PROMPT = 500, 200, 300
"""Number of characters used from the start and end of the answer, and the start of the prompt."""
CHARACTERS, PROMPT_WORDS = 300, 40
"""Number of characters of the answer used for character n-grams, and of words of the prompt."""
GROUPS = {
    "first": 1.0, "head": 1.0, "end": 0.6, "first characters": 0.7, "head characters": 0.7,
    "classes": 1.0, "prompt": 0.5, "form": 1.0,
}  # fmt: skip
"""The norm of each group of features."""

_GAP = re.compile(r"(\s{100})\s+")
"""Other patterns begin with any amount of whitespace, and take quadratic time on long runs of it.
"""
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_OBJECT = re.compile(r"(?:```(?:json)?\s*)?(\{.*\})\s*(?:```)?", re.DOTALL)
_MARKUP = re.compile(r"[*_`#]+|^\s*>\s?", re.MULTILINE)
_QUOTED = re.compile(
    r"\"[^\"\n]{3,400}\"|«[^»\n]{3,400}»|„[^“”\n]{3,400}[“”]|[「『][^」』\n]{3,400}[」』]"
)
_DIALOGUE = re.compile(
    r"^[^\W\d_][\w. ]{0,20}[:：] ?.*\n+[^\W\d_][\w. ]{0,20}[:：] ?", re.MULTILINE
)
_LIST = re.compile(r"^\s*(?:[-•]|\d+[.)])\s", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[^\w\s]")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


@dataclass(frozen=True)
class _Answer:
    """An answer, prepared for feature extraction.

    text: lowercase, without markup, with quotations as `""`. asked: prefixes of the prompt's words.
    """

    whole: str
    text: str
    prompt: str
    asked: frozenset[str]
    has_code: bool
    is_json: bool


def features(text: str, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashed features: buckets (which can repeat) and values, both of shape (features,)."""
    buckets: list[int] = []
    values: list[float] = []
    for group, names in _groups(_read(text, prompt)):
        found = dict.fromkeys(names)
        buckets += [
            zlib.crc32(f"{group} {name}".encode("utf-8", "surrogatepass")) % BUCKETS
            for name in found
        ]
        values += [GROUPS[group] / math.sqrt(len(found))] * len(found)
    return np.array(buckets, dtype=np.int64), np.array(values)


def _read(text: str, prompt: str) -> _Answer:
    text, prompt = _plain(text.strip()), _plain(prompt)[:PROMPT].lower()
    said = _json_texts(text)
    whole = _MARKUP.sub("", _CODE.sub(" <code> ", said or text)).strip()
    asked = frozenset(word[:5] for word in _words(prompt) if len(word) > 3)
    return _Answer(
        whole=whole, text=_QUOTED.sub(' "" ', whole).lower(), prompt=prompt, asked=asked,
        has_code="```" in text, is_json=said is not None,
    )  # fmt: skip


def _plain(text: str) -> str:
    text = _GAP.sub(r"\1", unicodedata.normalize("NFKC", text))
    return re.sub("[’‘´ʼ]", "'", text).replace("“", '"').replace("”", '"')


def _json_texts(text: str) -> str | None:
    """The strings in a JSON object, which may be in a code fence; None if it is anything else."""
    found = _OBJECT.fullmatch(text)
    try:
        value = json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return " ".join(part for part in value.values() if isinstance(part, str))


def _words(text: str) -> list[str]:
    """Split into words, numbers as `0`, punctuation, and single characters of scripts without
    spaces."""
    found: list[str] = []
    for word in _WORD.findall(text):
        if _UNSPACED.search(word):
            found.extend(word)
        else:
            found.append("0" if word.isdigit() else word)
    return found


def _groups(answer: _Answer) -> Iterator[tuple[str, Sequence[str]]]:
    head = answer.text[:HEAD]
    parts = (part.strip() for part in _SENTENCE_END.split(head))
    sentences = [part for part in parts if part] or [""]
    end = answer.text[-TAIL:] if len(answer.text) > HEAD else sentences[-1]
    yield "first", _ngrams(_words(sentences[0]), answer.asked)
    yield "head", _ngrams(_words(head), answer.asked)
    yield "end", _ngrams(_words(end), answer.asked)
    yield "first characters", _character_ngrams(sentences[0])
    yield "head characters", _character_ngrams(head[:CHARACTERS])
    yield "classes", list(_classes(answer))
    if answer.prompt:
        yield "prompt", _ngrams(_words(answer.prompt)[:PROMPT_WORDS], frozenset())
    yield "form", list(_form(answer, sentences))


def _ngrams(words: Sequence[str], asked: frozenset[str]) -> list[str]:
    """N-grams of one to three words, pairs with one or two words in between, and trigrams with
    words of the prompt masked as `@`."""
    words = ["^", *words, "$"]
    masked = ["@" if word[:5] in asked else word for word in words]
    found = []
    for at, word in enumerate(words):
        after = words[at + 1 : at + 4]
        found.append(word)
        found += [" ".join([word, *after[:size]]) for size in (1, 2) if size <= len(after)]
        found += [f"{word} {gap} {after[gap]}" for gap in (1, 2) if gap < len(after)]
        near = masked[at : at + 3]
        if "@" in near:
            found.append("m " + " ".join(near))
    return found


def _character_ngrams(text: str) -> list[str]:
    text = f" {' '.join(text.split())} "
    return [text[at : at + size] for size in (3, 4, 5) for at in range(len(text) - size + 1)]


def _classes(answer: _Answer) -> Iterator[str]:
    """Classes of the first clauses and of the prompt: single classes, and pairs in one clause."""
    opening = answer.text[:HEAD]
    language = language_of(opening, answer.prompt)
    asked = _matching(spaced(answer.prompt.replace("\n", " "), language), language)
    denied = False
    for number, clause in enumerate(clauses(opening)):
        said = _matching(spaced(clause, language), language)
        place = "first" if number == 0 else "denied" if denied else "before"
        for name in said:
            yield name
            yield f"{place} {name}"
        yield from (f"{one}+{two}" for one in said for two in said if one < two)
        denied = denied or not said.isdisjoint(("denies", "declines", "lacks", "policy"))
    kind = "denied" if denied else "nothing denied"
    yield kind
    for name in asked:
        yield f"asked {name}"
        yield f"asked {name}, {kind}"
    first = _words(answer.prompt)[:2]
    yield from (f"asked {' '.join(first[:size])}, {kind}" for size in range(1, len(first) + 1))


def _matching(said: str, language: Language) -> frozenset[str]:
    return frozenset(name for name, pattern in language.classes if pattern.search(said))


def _form(answer: _Answer, sentences: Sequence[str]) -> Iterator[str]:
    whole = answer.whole
    yield f"length {min(9, len(whole).bit_length())}"
    yield f"lines {min(3, whole.count(chr(10)))}"
    yield f"sentences {min(6, len(sentences))}"
    yield f"first {min(6, len(_words(sentences[0])) // 4)}"
    for name, is_so in (
        ("code", answer.has_code),
        ("json", answer.is_json),
        ("list", _LIST.search(whole) is not None),
        ("question last", whole.endswith(("?", "？"))),
        ("dialogue", _DIALOGUE.search(whole) is not None),
        ("starts quoted", whole.startswith(('"', "«", "„", "「", "—"))),
        ("quoted", whole.startswith('"') and whole.endswith('"')),
        ("quotes", '""' in answer.text),
        ("no prompt", not answer.prompt),
    ):
        if is_so:
            yield name
    if answer.prompt:
        words = [word for word in _words(answer.text[:HEAD]) if len(word) > 3]
        shared = sum(word[:5] in answer.asked for word in words) / max(1, len(words))
        yield f"shared {int(5 * shared)}"
        yield f"prompt length {min(9, len(answer.prompt).bit_length())}"


SHOWN = 100
"""Maximum characters of a refusing clause to show."""


@dataclass(frozen=True)
class Weights:
    """Quantized weights. quantized: int8, shape (BUCKETS,); a weight is scale times its integer."""

    quantized: np.ndarray
    scale: float
    bias: float


@cache
def weights() -> Weights:
    with as_file(files("stillhouse.synthesis").joinpath("refusal_weights.npz")) as path:
        read = np.load(path)
        return Weights(read["quantized"], float(read["scale"]), float(read["bias"]))


def refusing_words(text: str, prompt: str = "") -> str | None:
    """The clause in which an answer (without reasoning) refuses; None if it does not.

    prompt: the user's message, if known, with which more refusals are recognized. The clause is the
    one among the first clauses with the highest score by itself.
    """
    if not text.strip() or score(text, prompt) <= 0:
        return None
    clause = max(clauses(text), key=lambda clause: score(clause, prompt), default=text)
    return clause.strip(" ,;:")[:SHOWN]


def score(text: str, prompt: str = "") -> float:
    """The log odds that an answer is a refusal."""
    buckets, values = features(text, prompt)
    known = weights()
    return float(known.scale * (values @ known.quantized[buckets]) + known.bias)
