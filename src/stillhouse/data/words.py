"""Defines when two texts, words or labels are the same, in every script.

- `normalized`: differences of case, width, Unicode form and spacing do not count.
- `bare`: nor does the punctuation around the text. Labels are compared by it.
- `words`: nor does any punctuation. Duplicates and contamination are found by it.
- `collapsed`: only spacing and Unicode form do not count. Free text is compared by it.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import regex

_INVISIBLE = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\u0640&&[^\U000E0020-\U000E007F]]", regex.V1
)
"""Characters that do not change what is read: byte order marks, joiners, zero-width spaces, soft
hyphens, direction marks, variation selectors, and the Arabic tatweel, which lengthens a line. The
tags E0020 to E007F tell flags apart."""
_BLANK = regex.compile(r"[\ufeff\u200b\u2060\u00ad]")
"""Invisible characters that are not part of a word's spelling in any script."""
_FOLDED = regex.compile("[^¼-¾²³¹⁰-₉⅐-⅟↉]+")
"""All but raised and lowered digits and fractions, which NFKC would make other numbers of."""
_TYPOGRAPHY = str.maketrans("‘’“”„‐−", '\'\'"""--')
"""Quotes, hyphens and minus signs to those that keyboards have."""
_UNSPACED = (
    r"[[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Javanese}\p{Balinese}\p{Tai_Le}\p{New_Tai_Lue}"
    r"\p{Tai_Tham}\p{Tai_Viet}\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\u30fc]"
    r"&&[\p{L}\p{M}\p{N}]]"
)
"""Scripts that put no spaces between words. (Tibetan ends its syllables with a mark.)"""
_LETTER = rf"[[\p{{L}}\p{{N}}_]--{_UNSPACED}]"
_EMOJI = r"[\u2600-\u27bf\U0001f000-\U0001faff&&\p{So}]"
_MARK = rf"[\p{{M}}--{_UNSPACED}]"
_WORD = regex.compile(rf"{_UNSPACED}|{_LETTER}[{_LETTER}{_MARK}]*|{_EMOJI}", regex.V1)
_ASCII_WORD = regex.compile(r"[a-z0-9_]+")
_AROUND = r"[\s.,:;!?\"'`*()\[\][\p{P}--[\p{ASCII}‰‱٪]]]"
_PUNCTUATION = regex.compile(rf"^{_AROUND}+|{_AROUND}+$", regex.V1)
MISSING = r"na|null|<na>|\\n|#(n/a|ref!|name\?|value!|div/0!|null!|num!)"
"""A pattern for what R, databases and Excel write into an empty or broken cell, in any case."""
_OPENS_SYLLABLE = r"[\u0e40-\u0e44\u0ec0-\u0ec4\u1039\u17d2\u1b44\ua9c0]"
"""Thai and Lao vowels that are written before their consonant, and signs that stack the next
consonant: what follows them does not begin a word."""
_ENDS_SYLLABLE = r"[\p{M}\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3]"
"""Marks, and Thai and Lao vowels that are written after their consonant: they belong to the word
before them."""


def normalized(text: str) -> str:
    """The text in Unicode's compatibility caseless form, for comparisons (NFKC after
    full case folding; The Unicode Standard, D146) without invisible characters, with single spaces.

    Full-width letters, ligatures and decomposed accents are the letters that they show; ß is ss and
    İ is i; quotes, hyphens and minus signs are those of a keyboard. Accents, vowel signs, raised
    digits and fractions stay.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    # NFD first: a Greek iota below a letter becomes a letter of its own when the case is folded.
    folded = _compatible(unicodedata.normalize("NFD", text)).casefold()
    folded = _compatible(folded).replace("i\u0307", "i").translate(_TYPOGRAPHY)
    return " ".join(_INVISIBLE.sub("", folded).split())


def _compatible(text: str) -> str:
    form = _FOLDED.sub(lambda part: unicodedata.normalize("NFKC", part[0]), text)
    return unicodedata.normalize("NFC", form)


def bare(text: str) -> str:
    """Normalized, without the punctuation around it; punctuation alone stays."""
    plain = normalized(text)
    return _PUNCTUATION.sub("", plain) or plain


def words(text: str) -> list[str]:
    """The words of the normalized text, each with its combining marks, without punctuation.

    In a script that puts no spaces between words, every character is one; so is an emoji.
    """
    plain = normalized(text)
    return _ASCII_WORD.findall(plain) if plain.isascii() else _WORD.findall(plain)


def collapsed(text: str) -> str:
    """The text in NFC with single spaces, without byte order marks, zero-width spaces and soft
    hyphens: case, width and joiners stay."""
    if not text.isascii():
        text = _BLANK.sub("", unicodedata.normalize("NFC", text))
    return " ".join(text.split())


@cache
def whole_words(phrase: str) -> regex.Pattern[str]:
    """A pattern that finds the phrase where it begins and ends as words do. Both the phrase and
    the text are `normalized` or `bare`.

    In a script that puts no spaces between words, it begins and ends with complete syllables.
    """
    letter = rf"[{_LETTER}\p{{M}}]"
    before, after = _OPENS_SYLLABLE, _ENDS_SYLLABLE
    if regex.match(_LETTER, phrase, regex.V1):
        before = letter
    if regex.search(rf"{_LETTER}{_MARK}*$", phrase, regex.V1):
        after = letter
    return regex.compile(rf"(?<!{before}){regex.escape(phrase)}(?!{after})", regex.V1)
