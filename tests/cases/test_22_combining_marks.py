"""Words, duplicates, and labels in scripts that write vowels as combining marks."""

from __future__ import annotations

from stillhouse.classify.label_judgment import label_shares
from stillhouse.classify.label_prompts import LabelPrompt
from stillhouse.generation.request import Answer
from stillhouse.synthesis.filters import Row, decontaminate, exact_duplicates
from stillhouse.synthesis.prompts import Prompt


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def test_answers_that_differ_by_a_vowel_sign_are_both_kept() -> None:
    judge = exact_duplicates()
    answers = ("वह कल आया", "वह कल आयी")  # he came yesterday, she came yesterday
    assert [judge(Row(user("अनुवाद"), text, "stop", "")) for text in answers] == [None, None]


def test_a_prompt_that_differs_by_a_vowel_sign_is_not_in_the_evaluation_set() -> None:
    judge = decontaminate([Prompt(user("दिन"), "")], 13)  # day
    assert judge(Row(user("दान"), "x", "stop", "")) is None  # gift
    assert judge(Row(user("दिन"), "x", "stop", "")) is not None


def test_a_longer_word_that_begins_with_a_label_is_not_that_label() -> None:
    prompt = LabelPrompt({"less": "कम", "more": "अधिक"}, None, "{text}", "{label}")

    def label(said: str) -> tuple[str, dict[int, float]]:
        return label_shares(Answer(said, "stop"), prompt, False)

    assert label("कम") == ("label", {0: 1.0})
    assert label("कमाल") == ("outside", {})  # wonderful
    assert label("अधिकार") == ("outside", {})  # right, authority
