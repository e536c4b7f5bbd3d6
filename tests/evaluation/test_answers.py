"""Measures of answers, worked out by hand."""

from __future__ import annotations

import pytest

from stillhouse.evaluation.answers import compare, facts_of, field_f1, same_text


def test_facts_are_scalars_with_their_paths() -> None:
    value = {"who": {"name": "Anna  B"}, "tags": ["x", "y", "x"], "age": 3, "ok": True, "no": None}
    assert facts_of(value) == {
        ("who.name", '"anna b"'): 1,
        ("tags[]", '"x"'): 2,
        ("tags[]", '"y"'): 1,
        ("age", "3.0"): 1,
        ("ok", "true"): 1,
    }


def test_a_number_is_not_its_text_and_the_order_of_a_list_is_nothing() -> None:
    assert facts_of({"a": 3}) == facts_of({"a": 3.0})
    assert facts_of({"a": 3}) != facts_of({"a": "3"})
    assert facts_of([1, 2]) == facts_of([2, 1])


def test_f1_counts_facts_over_all_texts_and_by_field() -> None:
    said = [{"name": "Anna", "age": 3}, None]
    true = [{"name": "Anna", "age": 4}, {"name": "Bo", "age": 5}]
    # One fact of two said is right, of four that are true.
    whole, fields = field_f1(said, true)
    assert whole == pytest.approx(2 * 1 / (2 + 4))
    assert fields == {"age": 0.0, "name": pytest.approx(2 * 1 / (1 + 2))}


def test_nothing_said_where_nothing_is_true_is_right() -> None:
    assert field_f1([{}], [{"name": None}]) == (1.0, {})


def test_the_same_words_are_the_same_text() -> None:
    assert same_text("one  two\n", "one two")
    assert not same_text("One two", "one two")


def test_a_win_is_one_in_both_orders() -> None:
    # Ours is A, then B: won, lost, always the first, a tie and a win, unreadable.
    verdicts = [("A", "B"), ("B", "A"), ("A", "A"), ("tie", "B"), (None, "A")]
    found = compare(verdicts)
    assert (found.wins, found.ties, found.losses, found.unread) == (1, 2, 1, 1)
    assert found.consistent == 2
    assert found.preferred == pytest.approx((1 + 2 / 2) / 4)
