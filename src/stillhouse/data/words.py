"""Defines when two texts, words, or labels are the same, in every script.

- `normalized` ignores case, width, Unicode form, and spacing.
- `bare` also ignores punctuation around the text. It is used to compare labels.
- `words` ignores all punctuation. It is used to find duplicates and contamination.
- `collapsed` ignores only spacing and Unicode form. It is used to compare free text.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import regex

_INVISIBLE = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\u0640&&[^\U000E0020-\U000E007F]]", regex.V1
)
"""Characters that do not change the text that is read: byte order marks, joiners, zero-width
spaces, soft hyphens, direction marks, variation selectors, and the Arabic tatweel, which stretches
a word. The tags E0020 to E007F are excluded because they distinguish flags."""
_BLANK = regex.compile(r"[\ufeff\u200b\u2060\u00ad]")
"""Invisible characters that are not part of a word's spelling in any script."""
_FOLDED = regex.compile("[^¼-¾²³¹⁰-₉⅐-⅟↉]+")
"""Everything except superscript and subscript digits and fractions, which NFKC would turn into
different numbers."""
_TYPOGRAPHY = str.maketrans("‘’“”„‐−", '\'\'"""--')
"""Maps quotes, hyphens, and minus signs to those on keyboards."""
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
"""A pattern for what R, databases, and Excel write into an empty or broken cell, in any case."""
_OPENS_SYLLABLE = r"[\u0e40-\u0e44\u0ec0-\u0ec4\u1039\u17d2\u1b44\ua9c0]"
"""Thai and Lao vowels that are written before their consonant, and signs that stack the next
consonant. The character after them does not begin a word."""
_ENDS_SYLLABLE = r"[\p{M}\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3]"
"""Marks, and Thai and Lao vowels that are written after their consonant. They belong to the word
before them."""


def normalized(text: str) -> str:
    """Normalize a text for comparisons, without invisible characters and with single spaces.

    Uses Unicode's compatibility caseless form (NFKC after full case folding; The Unicode Standard,
    D146). Full-width letters, ligatures, and decomposed accents become plain letters; ß becomes ss
    and İ becomes i; quotes, hyphens, and minus signs become those of a keyboard. Accents, vowel
    signs, superscript digits, and fractions stay.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    # NFD first: case folding turns a Greek iota subscript into a separate letter.
    folded = _compatible(unicodedata.normalize("NFD", text)).casefold()
    folded = _compatible(folded).replace("i\u0307", "i").translate(_TYPOGRAPHY)
    return " ".join(_INVISIBLE.sub("", folded).split())


def _compatible(text: str) -> str:
    form = _FOLDED.sub(lambda part: unicodedata.normalize("NFKC", part[0]), text)
    return unicodedata.normalize("NFC", form)


def bare(text: str) -> str:
    """Normalize a text and strip punctuation around it; a text of only punctuation is kept."""
    plain = normalized(text)
    return _PUNCTUATION.sub("", plain) or plain


def words(text: str) -> list[str]:
    """Split the normalized text into words with their combining marks, without punctuation.

    In a script that puts no spaces between words, every character is a word. So is every emoji.
    """
    plain = normalized(text)
    return _ASCII_WORD.findall(plain) if plain.isascii() else _WORD.findall(plain)


def collapsed(text: str) -> str:
    """Convert a text to NFC with single spaces, without byte order marks, zero-width spaces, and
    soft hyphens. Case, width, and joiners stay."""
    if not text.isascii():
        text = _BLANK.sub("", unicodedata.normalize("NFC", text))
    return " ".join(text.split())


@cache
def whole_words(phrase: str) -> regex.Pattern[str]:
    """A pattern that finds the phrase at word boundaries. Both the phrase and the text must be
    `normalized` or `bare`.

    In a script that puts no spaces between words, it matches complete syllables.
    """
    letter = rf"[{_LETTER}\p{{M}}]"
    before, after = _OPENS_SYLLABLE, _ENDS_SYLLABLE
    if regex.match(_LETTER, phrase, regex.V1):
        before = letter
    if regex.search(rf"{_LETTER}{_MARK}*$", phrase, regex.V1):
        after = letter
    return regex.compile(rf"(?<!{before}){regex.escape(phrase)}(?!{after})", regex.V1)
