"""Metrics of answers agree with values calculated by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from stillhouse.evaluation.answers import compare, facts_of, field_f1, same_json, same_text
from stillhouse.evaluation.assignment import largest_total


def test_facts_are_scalars_with_their_paths() -> None:
    value = {"who": {"name": "Anna  B"}, "tags": ["x", "y", "x"], "age": 3, "ok": True, "no": None}
    assert facts_of(value) == {
        ("who.name", '"anna b"'): 1,
        ("tags[]", '"x"'): 2,
        ("tags[]", '"y"'): 1,
        ("age", "3.0"): 1,
        ("ok", "true"): 1,
    }


def test_a_number_is_not_its_text_and_the_order_of_a_list_does_not_matter() -> None:
    assert facts_of({"a": 3}) == facts_of({"a": 3.0})
    assert facts_of({"a": 3}) != facts_of({"a": "3"})
    assert facts_of([1, 2]) == facts_of([2, 1])


def test_f1_counts_facts_over_all_texts_and_by_field() -> None:
    said = [{"name": "Anna", "age": 3}, None]
    true = [{"name": "Anna", "age": 4}, {"name": "Bo", "age": 5}]
    # One of the two predicted facts is correct, and there are four true facts.
    whole, fields = field_f1(said, true)
    assert whole == pytest.approx(2 * 1 / (2 + 4))
    assert fields == {"age": 0.0, "name": pytest.approx(2 * 1 / (1 + 2))}


def test_an_empty_answer_is_correct_if_the_reference_is_empty() -> None:
    assert field_f1([{}], [{"name": None}]) == (1.0, {})


def test_the_same_words_are_the_same_text() -> None:
    assert same_text("one  two\n", "one two")
    assert not same_text("One two", "one two")


def test_a_win_counts_only_if_it_is_one_in_both_orders() -> None:
    # Our answer is A, then B: won, lost, the first answer twice, a tie and a win, unreadable.
    verdicts = [("A", "B"), ("B", "A"), ("A", "A"), ("tie", "B"), (None, "A")]
    found = compare(verdicts)
    assert (found.wins, found.ties, found.losses, found.unread) == (1, 2, 1, 1)
    assert found.consistent == 2
    assert found.preferred == pytest.approx((1 + 2 / 2) / 4)


# --- equality ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2.0], "a": 1.0}),
        ({"name": "Anna  B\n"}, {"name": "Anna B"}),
        ({"name": "Zoe\u0301"}, {"name": "Zo\u00e9"}),
        ({"name\u0301": {"x": 1}}, {"nam\u00e9": {"x": 1}}),
        ({"a": "\ufeffZo\u00e9"}, {"a": "Zoe\u0301"}),
        ([], []),
        (None, None),
        (0.0, -0.0),
    ],
)
def test_equal_values_are_the_same_json(one: object, other: object) -> None:
    assert same_json(one, other)
    assert same_json({"x": [one]}, {"x": [other]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tags": ["x", "y"]}, {"tags": ["y", "x"]}),
        ({"tags": ["x", "x"]}, {"tags": ["x"]}),
        ({"a": 1}, {"a": "1"}),
        ({"a": 1}, {"a": True}),
        ({"a": None}, {}),
        ({"a": ""}, {"a": None}),
        ({"a": []}, {"a": {}}),
        ({"name": "anna"}, {"name": "Anna"}),
        ({"name": "\uff21nna"}, {"name": "Anna"}),
        ({"a": 0.1}, {"a": 0.1000001}),
        ({"a": "1.0"}, {"a": "1"}),
        ({"a": "null"}, {"a": None}),
        ({"a": {"b": 1}}, {"a": [{"b": 1}]}),
        ({"a": [[1, 2], [3]]}, {"a": [[1], [2, 3]]}),
        ({"a": [1, [2, 3]]}, {"a": [[2, 3], 1]}),
        ({"from": "Oslo", "to": "Rome"}, {"from": "Rome", "to": "Oslo"}),
        ({"a": [1]}, {"a": 1}),
        ({"id": 2**53}, {"id": 2**53 + 1}),
        (
            [{"name": "Anna", "age": 3}, {"name": "Bo", "age": 5}],
            [{"name": "Anna", "age": 5}, {"name": "Bo", "age": 3}],
        ),
    ],
)
def test_different_values_are_not_the_same_json(one: object, other: object) -> None:
    assert not same_json(one, other)
    assert not same_json({"x": one}, {"x": other})


def test_facts_of_different_items_are_not_combined() -> None:
    people = [{"name": "Anna", "age": 3}, {"name": "Bo", "age": 5}]
    swapped = [{"name": "Anna", "age": 5}, {"name": "Bo", "age": 3}]
    assert field_f1([{"people": swapped}], [{"people": people}])[0] == 2 / 4
    assert field_f1([{"people": people[::-1]}], [{"people": people}])[0] == 1.0
    assert field_f1([{"people": people[:1]}], [{"people": people}])[0] == 2 * 2 / (2 + 4)
    assert field_f1([{"people": [*people, *people]}], [{"people": people}])[0] == 2 * 4 / (8 + 4)


def test_the_order_of_items_does_not_change_f1() -> None:
    """Each item has a fact in common with several items of the other list."""
    ours = [{"a": 1, "b": 1}, {"a": 1}]
    theirs = [{"a": 1}, {"b": 1}]
    for one in permutations(ours):
        for other in permutations(theirs):
            assert field_f1([{"x": list(one)}], [{"x": list(other)}])[0] == 2 * 2 / (3 + 2)


def test_swapped_fields_of_nested_items_are_not_shared() -> None:
    said = {"orders": [{"id": 1, "lines": [{"sku": "a", "n": 2}, {"sku": "b", "n": 5}]}]}
    true = {"orders": [{"id": 1, "lines": [{"sku": "a", "n": 5}, {"sku": "b", "n": 2}]}]}
    assert field_f1([said], [true])[0] == 2 * 3 / (5 + 5)


def test_field_names_are_compared_in_one_unicode_form() -> None:
    assert field_f1([{"name\u0301": 1}], [{"nam\u00e9": 1}]) == (1.0, {"nam\u00e9": 1.0})


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 1), (2, 5), (5, 2), (4, 4), (6, 5)])
def test_the_largest_total_agrees_with_trying_all_pairings(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for most in (1, 2, 9) * 5:
        scores_MN = random.integers(0, most + 1, shape)
        wide_MN = scores_MN if shape[0] <= shape[1] else scores_MN.T
        ways = permutations(range(wide_MN.shape[1]), wide_MN.shape[0])
        best = max(sum(wide_MN[m, n] for m, n in enumerate(way)) for way in ways)
        assert largest_total(scores_MN) == best


def test_integers_beyond_the_precision_of_floats_are_different_facts() -> None:
    assert facts_of({"id": 2**53 + 1}) != facts_of({"id": 2**53})


def test_a_key_with_a_dot_is_a_field_of_its_own() -> None:
    assert field_f1([{"a.b": 1}], [{"a": {"b": 1}}]) == (0.0, {"a": 0.0, "a.b": 0.0})


def test_an_invalid_answer_is_wrong_even_if_the_reference_is_empty() -> None:
    assert field_f1([None, {}], [{}, {}])[0] == 0.5
