"""Detects the encoding of a text file that is not UTF-8.

Only a byte order mark makes a different encoding certain, so only then is the file read. Otherwise,
the encoding is guessed from the text, for an error message with the command to convert the file.
"""

from __future__ import annotations

import codecs
import re

import regex

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WESTERN = [
    "äöüß",
    "àâæçéèêëîïôœùûüÿ",
    "áéíóúñü",
    "áâãàçéêíóôõúü",
    "àèéìòóù",
    "åäöæøé",
    "áðéíóúýþæö",
    "àçèéíïòóúü·",
    "éëïöüè",
]
_CENTRAL = ["ąćęłńóśźż", "áčďéěíňóřšťúůýžľĺŕäô", "áéíóöőúüű", "čćđšž", "ăâîşţ"]
_LATIN = {
    "latin_1": _WESTERN,
    "cp1252": _WESTERN,
    "cp1254": ["çğıiöşüâîû"],
    "cp1250": _CENTRAL,
    "iso8859_2": _CENTRAL,
    "mac_roman": _WESTERN,
    "cp850": _WESTERN,
}
"""Encodings of Latin scripts, with the non-ASCII letters of the languages that use them."""
_PUNCTUATION = "“”„‘’‚«»‹›–—…•€£°§·¿¡™©®\u00a0"
_OTHERS = [
    "cp932", "euc_jp", "gb18030", "big5", "cp949", "cp1251", "koi8_r", "cp1253", "cp1255",
    "cp1256", "cp874",
]  # fmt: skip
_NAMES = {
    "latin_1": "ISO-8859-1",
    "iso8859_2": "ISO-8859-2",
    "mac_roman": "MACINTOSH",
    "euc_jp": "EUC-JP",
    "koi8_r": "KOI8-R",
}
"""Python's names of encodings to iconv's, where these differ by more than case."""
_NOT_LATIN = regex.compile(r"(?<=\p{Ll})\p{Lu}|(?<!\p{L})[\p{L}--\p{ASCII}]{3,}(?!\p{L})", regex.V1)
"""A capital after a lower-case letter, or a word without any ASCII letter."""
_LEAST = 0.9
"""Minimum share of the non-ASCII characters that must be letters of one Latin language."""
_SAMPLE = 4096
"""Minimum number of bytes for a reliable guess; a shorter text is repeated."""


def marked_encoding(head: bytes) -> str:
    """The encoding that the byte order mark declares; UTF-8 if there is none."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")


def unmarked_utf16(head: bytes) -> str | None:
    """Detect UTF-16 or UTF-32 without a byte order mark, by the positions of null bytes.

    Returns iconv's name of the encoding, or None.
    """
    zeros = [head[at::4].count(0) for at in range(4)]
    full = len(head) // 4
    if sum(zeros) < len(head) / 4 and _is_utf8(head):
        return None
    # In UTF-32, the highest byte of a character is always 0, and the next one nearly always.
    if zeros[2] + zeros[3] >= 1.9 * full:
        return "UTF-32LE"
    if zeros[0] + zeros[1] >= 1.9 * full:
        return "UTF-32BE"
    for name, here, there in (("UTF-16LE", 1, 0), ("UTF-16BE", 0, 1)):
        if zeros[here] + zeros[here + 2] > 4 * (zeros[there] + zeros[there + 2]):
            decoded = head[: len(head) // 2 * 2].decode(name, "replace")
            if not re.search("[\0-\x08\x0e-\x1f\ufffd]", decoded[:-1]):
                return name
    return None


def guessed_encoding(text: bytes) -> str | None:
    """The most probable encoding of lines that are not UTF-8, under Python's name."""
    shares = {name: _letters(text, name) for name in _LATIN}
    best = max(shares, key=shares.__getitem__)
    if shares[best] >= _LEAST:
        return best
    from charset_normalizer import from_bytes

    repeated = text * (_SAMPLE // len(text) + 1)
    found = from_bytes(repeated, cp_isolation=_OTHERS).best()
    return None if found is None else found.encoding


def iconv_name(encoding: str) -> str:
    return _NAMES.get(encoding, encoding.replace("cp125", "windows-125").upper())


def _letters(text: bytes, encoding: str) -> float:
    """The share of the non-ASCII characters that are plausible in one Latin language."""
    try:
        decoded = text.decode(encoding)
    except UnicodeDecodeError:
        return 0.0
    odd = sum(c > "\x7f" for c in decoded)
    if sum(c.isascii() and c.isalpha() for c in decoded) < odd / 2:
        return 0.0
    plain = _NOT_LATIN.sub("", decoded)

    def known(letters: str) -> int:
        return sum(c in _PUNCTUATION or c.lower()[0] in letters for c in plain if c > "\x7f")

    return max(map(known, _LATIN[encoding])) / max(1, odd)


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
