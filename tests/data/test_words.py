"""Which texts, words, and labels count as the same, in many scripts."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from stillhouse.data.documents import Document, group_hash
from stillhouse.data.words import bare, collapsed, normalized, whole_words, words
from stillhouse.evaluation.answers import facts_of, same_text
from stillhouse.synthesis.near_duplicates import NearDuplicates

SAME = [
    ("café", "cafe\u0301"),  # one character, or a letter and a mark
    ("한국어", unicodedata.normalize("NFD", "한국어")),
    ("ＡＢＣ　１２", "abc 12"),  # full width
    ("ｶﾞｷﾞ", "ガギ"),  # half width
    ("ﬁnﬂ", "finfl"),  # ligatures
    ("ﻼﺳ", "لاس"),  # presentation forms
    ("STRASSE", "Straße"),
    ("İSTANBUL", "istanbul"),
    ("ΟΔΟΣ", "οδος"),  # final sigma
    ("ᾳ\u0301", "Α\u0301Ι"),  # an iota below a letter is a letter in capitals
    ("㎒", "MHz"),
    ("سـلام", "سلام"),  # tatweel
    ("کتاب‌ها", "کتابها"),  # a zero-width non-joiner
    ("हिन्‍दी", "हिन्दी"),  # a zero-width joiner
    ("ភាសា\u200bខ្មែរ", "ភាសាខ្មែរ"),  # a zero-width space between words
    ("\ufeffone\r\ntwo\u00a0three", "one two three"),
    ("sta\u00adtion", "station"),  # a soft hyphen
    ("❤️", "❤"),  # a variation selector
    ("the driver’s “licence”", 'the driver\'s "licence"'),
    ("−5 to non\u2011stop", "-5 to non-stop"),
]
DIFFERENT = [
    ("आया", "आयी"),
    ("คน", "คืน"),
    ("कम", "काम"),
    ("כֶּלֶב", "כָּלֵב"),  # dog, the name Caleb
    ("عِلم", "عَلَم"),  # knowledge, flag
    ("peche", "pêché"),
    ("10²", "102"),
    ("1½", "11/2"),
    ("x₁", "x1"),
    ("sık", "sik"),
    ("か", "が"),
    ("👍", "👎"),
    ("🏴\U000e0067\U000e0062\U000e0065\U000e007f", "🏴\U000e0067\U000e0062\U000e0073\U000e007f"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_the_same_text_are_equal(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)
    assert words(one) == words(other)
    assert facts_of({"a": one}) == facts_of({"a": other})


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_texts_are_not_equal(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)
    assert not same_text(one, other)
    assert bare(one) != bare(other)


@pytest.mark.run
def test_normalizing_is_idempotent_for_every_character() -> None:
    wrong = []
    for code in range(0xA0, sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Co", "Cs"):
            continue
        plain = normalized(character)
        others = {character.upper(), character.lower(), unicodedata.normalize("NFD", character)}
        if any(normalized(other) != plain for other in (plain, *others)):
            wrong.append(character)
    assert wrong == ["ı"]  # the language is unknown, so its capital is taken for that of i


def test_words_keep_their_marks_and_lose_their_punctuation() -> None:
    assert words("वह कल आया।") == ["वह", "कल", "आया"]
    assert words("नमस्ते, दुनिया!") == ["नमस्ते", "दुनिया"]
    assert words("வணக்கம் உலகம்") == ["வணக்கம்", "உலகம்"]
    assert words("שָׁלוֹם עוֹלָם") == ["שָׁלוֹם", "עוֹלָם"]
    assert words("བཀྲ་ཤིས་བདེ་ལེགས།") == ["བཀྲ", "ཤིས", "བདེ", "ལེགས"]


@pytest.mark.parametrize(
    "text", ["สวัสดี", "ສະບາຍດີ", "ភាសាខ្មែរ", "မြန်မာ", "你好世界", "こんにちは", "ꦱꦸꦒꦼꦁ", "ᦟᦲᧅ"]
)
def test_in_scripts_without_spaces_every_character_is_a_word(text: str) -> None:
    assert words(text) == list(text)
    assert words(f"a{text}b") == ["a", *text, "b"]


def test_punctuation_around_a_label_is_ignored_in_every_script() -> None:
    for said in ("“spam”。", "「Spam」", "«spam»", "¡SPAM!", "spam।", "spam؟", "**spam**"):
        assert bare(said) == "spam"
    assert bare("-5%") == "-5%"
    assert bare("?!") == "?!"


def test_a_phrase_is_found_only_at_word_boundaries() -> None:
    def found(phrase: str, text: str) -> bool:
        return bool(whole_words(normalized(phrase)).search(normalized(text)))

    assert found("कम", "यह कम है")
    assert found("CAFÉ", "in the cafe\u0301.")
    assert found("天気", "今日は天気です")
    assert found("c++", "C++ is it")
    assert not found("कम", "कमाल")
    assert not found("spam", "spammer")
    assert not found("yes", "yes\u0301")
    assert not found("คน", "คนี")  # the vowel belongs to the last consonant
    assert not found("กม", "เกม")  # as does the one that is written before it
    assert not found("មែ", "ខ្មែរ")  # the middle of a stack of consonants


def test_collapsing_whitespace_keeps_case_width_and_joiners() -> None:
    assert collapsed("\ufeffa\r\n cafe\u0301") == "a café"
    assert collapsed("Ａ کتاب\u200cها") == "Ａ کتاب\u200cها"
    assert same_text("cafe\u0301\r\n", "café")
    assert not same_text("x²", "x2")
    assert not same_text("Yes", "yes")


def test_unicode_forms_of_a_document_have_the_same_group_hash() -> None:
    assert group_hash(Document("\ufeffcafe\u0301\r\n")) == group_hash(Document("café"))


def test_half_of_a_surrogate_pair_is_compared_like_any_character() -> None:
    assert normalized("\ud83d A") == "\ud83d a"
    assert words("\ud83d A") == ["a"]
    assert NearDuplicates(0.8).add(words("\udc00 é")) is None


def test_answers_of_different_emoji_are_not_duplicates() -> None:
    seen = NearDuplicates(0.8)
    assert [seen.add(words(text)) for text in ("good? 👍", "good? 👎")] == [None, None]
    assert seen.add(words("Good?! 👍🏽")) is not None
