"""Which rows each filter drops, and how dropped rows are counted and written to a file."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.words import words
from stillhouse.errors import RecipeError
from stillhouse.synthesis import filters
from stillhouse.synthesis.filters import Filter, Filters, Row, Sieve
from stillhouse.synthesis.near_duplicates import NearDuplicates, shingles
from stillhouse.synthesis.prompts import Prompt


def row(text: str, *, prompt: str = "a question", **changes: Any) -> Row:
    facts = {"finish_reason": "stop", "where": "p.txt:1", **changes}
    return Row(({"role": "user", "content": prompt},), text, **facts)


def kept(judge: Filter, texts: list[str]) -> list[str]:
    return [text for text in texts if judge(row(text)) is None]


def test_answers_cut_off_at_the_token_limit_are_dropped() -> None:
    assert filters.truncated(row("half an ans", finish_reason="length")) is not None
    assert filters.truncated(row("whole.")) is None


def test_the_length_of_an_answer_does_not_include_reasoning() -> None:
    judge = filters.length(3, 5)
    assert kept(judge, ["ab", "abc", "abcde", "abcdef"]) == ["abc", "abcde"]
    assert judge(row("<think>\na long thought\n</think>\n\nabcd")) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "Sorry, I won't do that.",
        "As an AI language model, I have no opinion.",
        "Unfortunately, I am unable to browse.",
        "<think>\nhm\n</think>\n\nI'm not able to answer that.",
    ],
)
def test_refusals_are_dropped(text: str) -> None:
    assert filters.refusal(row(text)) is not None


@pytest.mark.parametrize(
    "text",
    [
        "The store said it was sorry, but it can't refund you.",
        "I can help with that.",
        "As an airline, they must pay.",
        "Sorry to hear that! Try again.",
    ],
)
def test_answers_that_resemble_refusals_are_kept(text: str) -> None:
    assert filters.refusal(row(text)) is None


def test_answers_that_the_server_reports_as_filtered_are_dropped() -> None:
    assert filters.refusal(row("", finish_reason="content_filter")) is not None


def test_a_pattern_can_be_required_or_forbidden() -> None:
    texts = ["label: a", "no", "<think>label: b</think>no"]
    assert kept(filters.pattern(r"^label: \w$", "filters"), texts) == ["label: a"]
    assert kept(filters.pattern("label", "filters", must_match=False), texts) == texts[1:]
    with pytest.raises(RecipeError, match="not a regular expression"):
        filters.pattern("(", "filters")


def test_answers_that_do_not_match_the_json_schema_are_dropped() -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0}},
        "required": ["age"],
        "additionalProperties": False,
    }
    judge = filters.json_schema(schema)
    texts = ['{"age": 3}', '{"age": -1}', '{"age": "3"}', "{}", '{"age": 3', '{"age": 1, "b": 2}']
    assert kept(judge, texts) == texts[:1]
    assert "$.age" in str(judge(row('{"age": -1}')))
    with pytest.raises(RecipeError, match="schema is not valid"):
        filters.json_schema({"type": "no such type"})


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$schema": 5, "type": "object"}, "$schema is not a URL: 5"),
        ({"$schema": ["x"], "type": "object"}, "$schema is not a URL"),
        ({"$schema": "http://[", "type": "object"}, "$schema is not a URL"),
        ({"type": "no such type"}, "not valid"),
        ({"type": "string", "pattern": "(a|aa)+$"}, "takes more than"),
        ({"$ref": "#/$defs/no"}, "refers to"),
    ],
)
def test_the_error_for_an_unusable_schema_names_its_file(
    schema: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    with pytest.raises(RecipeError) as caught:
        filters.json_schema(filters.read_schema(path), path)
    assert problem in caught.value.what
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"items": {"$ref": "#/$defs/no"}}}},
        {"type": "object", "properties": {"a": {"$ref": "https://example.com/a.json"}}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "anyOf": [{"$ref": "other.json"}]},
    ],
)
def test_a_schema_with_an_unresolvable_reference_is_rejected_immediately(
    schema: dict[str, Any],
) -> None:
    with pytest.raises(RecipeError, match="refers to"):
        filters.json_schema(schema)


def test_references_inside_a_schema_are_followed() -> None:
    schema = {
        "$id": "https://example.com/whole",
        "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "part"}},
        "$defs": {
            "a": {"type": "integer"},
            "b": {"$id": "part", "items": {"$ref": "#/$defs/c"}, "$defs": {"c": {"type": "null"}}},
        },
    }
    texts = ['{"a": 1, "b": [null]}', '{"a": "1"}', '{"b": [1]}']
    assert kept(filters.json_schema(schema), texts) == texts[:1]


def test_nonstandard_json_and_invalid_formats_are_dropped() -> None:
    judge = filters.json_schema({"properties": {"day": {"type": "string", "format": "date"}}})
    texts = ['{"day": "2024-02-29"}', '{"day": "2024-02-30"}', '{"a": NaN}', '{"a": -Infinity}']
    texts.append('{"a": 1, "a": 2}')
    assert kept(judge, texts) == texts[:1]


def test_json_may_be_in_one_code_fence() -> None:
    judge = filters.json_schema({"type": "object"})
    good = ["```json\n{}\n```", "```\n{}```", "<think>```</think> ```JSON \n{}\n```\n"]
    bad = ["Here:\n```json\n{}\n```", "```python\n{}\n```", "```json\n{}\n```\n```json\n{}\n```"]
    assert kept(judge, [*good, *bad]) == good


def test_exact_duplicates_need_the_same_prompt_and_answer() -> None:
    judge = filters.exact_duplicates()
    assert judge(row("Yes.")) is None
    assert judge(row("yes")) is not None
    assert judge(row("yes", prompt="another question")) is None
    assert judge(row("no")) is None


# --- near duplicates ---------------------------------------------------------------------------


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def made_texts(count: int, seed: int) -> list[list[str]]:
    """Texts of 60 words; every second one is a copy of the previous one with some words changed."""
    chance = random.Random(seed)
    texts: list[list[str]] = []
    for number in range(count):
        if number % 2:
            text = list(texts[-1])
            for at in chance.sample(range(len(text)), chance.randrange(0, 12)):
                text[at] = f"w{chance.randrange(10_000)}"
        else:
            text = [f"w{chance.randrange(10_000)}" for _ in range(60)]
        texts.append(text)
    return texts


def test_near_duplicates_agree_with_comparing_all_pairs() -> None:
    texts = made_texts(300, seed=1)
    sets = [shingles(text) for text in texts]
    near = NearDuplicates(0.7)
    found = {number for number, text in enumerate(texts) if near.add(text) is not None}
    for number in range(len(texts)):
        similarity = max((jaccard(sets[number], s) for s in sets[:number]), default=0.0)
        if similarity >= 0.8:
            assert number in found, similarity
        if similarity <= 0.55:
            assert number not in found, similarity
    assert len(found) > 25


def test_the_estimated_similarity_is_close_to_the_true_one() -> None:
    near = NearDuplicates(0.5)
    errors = []
    texts = made_texts(200, seed=2)
    for a, b in zip(texts[::2], texts[1::2], strict=True):
        estimate = float((near.signature(a) == near.signature(b)).mean())
        errors.append(abs(estimate - jaccard(shingles(a), shingles(b))))
    assert sum(errors) / len(errors) < 0.04
    assert max(errors) < 0.16


def test_very_short_and_empty_texts_are_similar_only_to_equal_ones() -> None:
    near = NearDuplicates(0.8)
    assert near.add(words("Yes.")) is None
    assert near.add(words("yes")) == 1.0
    assert near.add(words("no")) is None
    assert near.add([]) is None
    assert near.add([]) == 1.0


# --- decontamination ---------------------------------------------------------------------------


def test_rows_that_share_consecutive_words_with_the_evaluation_set_are_dropped() -> None:
    evaluation = [
        Prompt(({"role": "user", "content": "one two three four five six seven eight"},), "e:1"),
        Prompt(({"role": "user", "content": "a short, whole evaluation question"},), "e:2"),
        Prompt(({"role": "user", "content": "Hello there"},), "e:3"),
    ]
    judge = filters.decontaminate(evaluation, ngram=6)
    dropped = [
        row("x", prompt="He counts: ONE, two three -- four five six. Then he sleeps."),
        row("and then three four five six seven eight nine"),
        row("x", prompt="Here is a short whole evaluation question for you"),
        row("x", prompt="hello there!"),
    ]
    left = [
        row("x", prompt="one two three four five, and something else"),
        row("hello there"),
        row("x", prompt="hello there, who are you"),
    ]
    assert all(judge(one) is not None for one in dropped)
    assert all(judge(one) is None for one in left)


def test_an_evaluation_question_in_chinese_is_found_in_a_longer_text() -> None:
    evaluation = [Prompt(({"role": "user", "content": "中国的首都是哪一座城市？"},), "e:1")]
    judge = filters.decontaminate(evaluation, ngram=13)
    assert judge(row("x", prompt="请回答：中国的首都是哪一座城市？谢谢")) is not None
    assert judge(row("x", prompt="请回答：法国的首都在哪里？")) is None


def test_near_duplicates_in_japanese_are_dropped() -> None:
    judge = filters.near_duplicates(0.7)
    text = "私のカードはまだ届いていません。いつ届くのか教えてください。"
    assert judge(row(text)) is None
    assert judge(row(text + "お願い")) is not None


@pytest.mark.run
def test_only_text_that_is_clearly_in_another_language_is_dropped() -> None:
    judge = filters.languages(["en", "de"], "filters")
    dropped = ["Bonjour tout le monde, comment allez-vous ?", "これは日本語の文章です。"]
    left = [
        "The card was not accepted at the shop.",
        "Das ist ein kurzer Satz.",
        "42",
        "Paris",
        "x = [1, 2]",
        "<think>Je ne sais pas ce que cela veut dire.</think> I do not know what it means.",
    ]
    assert kept(judge, [*dropped, *left]) == left
    assert judge(row(dropped[0])) == "it is in the language fr (100% sure)"
    with pytest.raises(RecipeError, match="does not detect the language english"):
        filters.languages(["english"], "filters")


# --- all filters -------------------------------------------------------------------------------


def test_dropped_rows_are_counted_by_filter_and_written_to_a_file(tmp_path: Path) -> None:
    before = {
        "empty": filters.empty,
        "truncated": filters.truncated,
        "length": filters.length(None, 100),
    }
    after = {"exact_duplicates": filters.exact_duplicates()}
    sieve = Sieve(Filters(before, None, after), tmp_path / "dropped.jsonl")
    rows = [row("good"), row(" "), row("good", finish_reason="length"), row("good", sample=1)]
    assert [r.text for r in sieve.keep(rows)] == ["good"]
    assert sieve.dropped == {"empty": 1, "truncated": 1, "length": 0, "exact_duplicates": 1}
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [one["filter"] for one in dropped] == ["empty", "truncated", "exact_duplicates"]
    assert dropped[2]["reason"] == "an earlier row has the same prompt and answer"
    assert dropped[2]["sample"] == 1
    assert dropped[2]["messages"][-1] == {"role": "assistant", "content": "good"}


# --- other scripts -----------------------------------------------------------------------------

SAME_ANSWERS = [
    ("Café.", "cafe\u0301"),
    ("ＯＫ！", "ok"),
    ("「はい」", "はい"),
    ("Straße", "STRASSE"),
    ("\ufeffyes\r\n", "Yes."),
    ("don’t", "don't"),
]
OTHER_ANSWERS = [
    ("वह कल आया", "वह कल आयी"),
    ("2 + 2", "2 - 2"),
    ("a < b", "a > b"),
    ("👍", "👎"),
    ("x²", "x2"),
    ("C++", "C#"),
    ("ไม่", "ไม้"),
    ("ខ្មែរ", "ខមែរ"),
]


@pytest.mark.parametrize(("one", "other"), SAME_ANSWERS)
def test_answers_that_differ_in_case_punctuation_or_encoding_are_duplicates(
    one: str, other: str
) -> None:
    assert kept(filters.exact_duplicates(), [one, other]) == [one]


@pytest.mark.parametrize(("one", "other"), OTHER_ANSWERS)
def test_answers_that_differ_in_meaning_are_not_duplicates(one: str, other: str) -> None:
    assert kept(filters.exact_duplicates(), [one, other]) == [one, other]


@pytest.mark.parametrize(
    ("question", "inside", "other"),
    [
        ("แมวของฉันอยู่ที่ไหน", "ตอบ: แมวของฉันอยู่ที่ไหน ครับ", "ตอบ: หมาของฉันชื่ออะไร"),
        ("តើឆ្មារបស់ខ្ញុំនៅឯណា", "តើឆ្មា\u200bរបស់ខ្ញុំ\u200bនៅឯណា", "តើឆ្កែរបស់អ្នកឈ្មោះអី"),
        ("ｗｈａｔ ｉｓ ｔｈｅ ｎｅｗ ｏｎｅ", "Say: what is the new one?", "what is a new letter"),
        ("où est la bibliothèque municipale",
         unicodedata.normalize("NFD", "Dis: OÙ EST LA BIBLIOTHÈQUE MUNICIPALE ?"),
         "ou est la bibliotheque municipale"),
        ("मेरा कार्ड कहाँ खो गया", "बताओ: मेरा कार्ड कहाँ खो गया?", "मेरे कार्ड कहाँ खो गये"),
    ],
    ids=["Thai", "Khmer", "full width", "NFD", "Hindi"],
)  # fmt: skip
def test_an_evaluation_question_is_found_in_any_script(
    question: str, inside: str, other: str
) -> None:
    judge = filters.decontaminate([Prompt(({"role": "user", "content": question},), "e")], 13)
    assert judge(row("x", prompt=inside)) is not None
    assert judge(row("x", prompt=other)) is None
