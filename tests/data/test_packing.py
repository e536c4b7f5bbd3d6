"""Packing: every token is placed exactly once, and no document attends to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.data.packing import (
    Plan,
    Segment,
    fill_windows,
    most_windows,
    plan_isolated,
    plan_single,
    smallest_part,
)
from stillhouse.data.shift import IGNORED

CONTEXT = 24
row_lists = st.lists(
    st.tuples(st.booleans(), st.integers(1, 90)).map(
        lambda row: (row[0], row[1] if row[0] else min(row[1], CONTEXT))
    ),
    min_size=1,
    max_size=30,
)


def reader(ids: Sequence[np.ndarray], supervised: Sequence[np.ndarray]) -> Callable[..., Any]:
    """A function that reads segments from rows in memory."""

    def read(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        part = slice(segment.start, segment.start + segment.length)
        return ids[segment.row][part], supervised[segment.row][part]

    return read


@pytest.mark.parametrize("plan_windows", [plan_isolated, plan_single])
@given(rows=row_lists)
@settings(max_examples=150, deadline=None)
def test_every_token_is_placed_exactly_once(
    plan_windows: object, rows: list[tuple[bool, int]]
) -> None:
    splittable, lengths = [row[0] for row in rows], [row[1] for row in rows]
    plan: Plan = plan_windows(lengths, splittable, CONTEXT)  # type: ignore[operator]
    placed: Counter[tuple[int, int]] = Counter()
    for window in plan:
        assert window
        assert sum(segment.length for segment in window) <= CONTEXT
        for segment in window:
            placed.update((segment.row, segment.start + n) for n in range(segment.length))
            if not splittable[segment.row]:
                assert segment.length == lengths[segment.row]
    wanted = {(row, n): 1 for row, length in enumerate(lengths) for n in range(length)}
    assert placed == wanted


@given(rows=row_lists)
@settings(max_examples=50, deadline=None)
def test_windows_match_a_loop_over_their_tokens(rows: list[tuple[bool, int]]) -> None:
    rng = np.random.default_rng(len(rows))
    ids = [rng.integers(10, 99, length).astype(np.int32) for _, length in rows]
    supervised = [rng.random(length) < 0.6 for _, length in rows]
    plan = plan_isolated([n for _, n in rows], [cut for cut, _ in rows], CONTEXT)
    for segments, window in zip(
        plan, fill_windows(plan, reader(ids, supervised), CONTEXT, pad_id=0), strict=True
    ):
        expected = []
        for segment in segments:
            for n in range(segment.length):
                token = int(ids[segment.row][segment.start + n])
                predicted = bool(supervised[segment.row][segment.start + n]) and n > 0
                expected.append((token, token if predicted else IGNORED, n))
        expected += [(0, IGNORED, n) for n in range(CONTEXT - len(expected))]
        arrays = (window["input_ids"], window["labels"], window["position_ids"])
        assert list(zip(*(array.tolist() for array in arrays), strict=True)) == expected


@given(rows=row_lists)
@settings(max_examples=150, deadline=None)
def test_the_number_of_windows_does_not_exceed_the_bound(rows: list[tuple[bool, int]]) -> None:
    splittable, lengths = [row[0] for row in rows], [row[1] for row in rows]
    text = all(splittable)
    # The last row, if it cannot be cut, may exceed the tokens that a recipe sets.
    tokens = sum(lengths) if splittable[-1:] != [False] else sum(lengths[:-1]) + 1
    most = most_windows(tokens, CONTEXT, packed=True, splittable=text)
    assert len(plan_isolated(lengths, splittable, CONTEXT)) <= most
    single = plan_single(lengths, splittable, CONTEXT)
    assert len(single) <= most_windows(sum(lengths), CONTEXT, packed=False, splittable=text)


def test_the_bound_for_text_is_tight() -> None:
    full = CONTEXT - smallest_part(CONTEXT) + 1
    rows = [full] * 5
    assert len(plan_isolated(rows, [True] * 5, CONTEXT)) == 5
    assert most_windows(sum(rows), CONTEXT, packed=True, splittable=True) == 5


def test_text_fills_the_space_that_chats_leave() -> None:
    plan = plan_isolated([20, 30, 100], [False, False, True], 50)
    assert [sum(s.length for s in window) for window in plan] == [50, 50, 50]
    plan = plan_isolated([30, 100], [False, True], 50)
    assert [sum(s.length for s in window) for window in plan] == [50, 50, 30]


def test_text_is_not_cut_into_very_short_pieces() -> None:
    room = smallest_part(256) - 1
    plan = plan_isolated([256 - room, 40], [False, True], 256)
    assert [[s.length for s in window] for window in plan] == [[256 - room], [40]]


def test_documents_are_not_split_if_they_fit_whole() -> None:
    lengths = [30, 20, 25, 25, 40, 10]
    plan = plan_isolated(lengths, [True] * 6, 50)
    assert sorted(s.length for window in plan for s in window) == sorted(lengths)
    assert len(plan) == 3


def test_packing_chats_takes_at_most_eleven_ninths_of_the_minimum() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 500).tolist()
    plan = plan_isolated(lengths, [False] * 500, 512)
    assert len(plan) <= 11 / 9 * np.ceil(sum(lengths) / 512) + 1
    assert sum(lengths) / (512 * len(plan)) > 0.97


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_attention_across_documents(attention: str) -> None:
    """A document's logits are the same in a shared window and in a window of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    lengths = [9, 7, 1, 5]
    ids = [np.random.default_rng(n).integers(1, 97, n).astype(np.int32) for n in lengths]
    plan = plan_isolated(lengths, [False] * 4, CONTEXT)
    read = reader(ids, [np.ones(n, bool) for n in lengths])
    (window,) = fill_windows(plan, read, CONTEXT, pad_id=0)
    input_ids_1L = torch.from_numpy(window["input_ids"]).long()[None]
    position_ids_1L = torch.from_numpy(window["position_ids"]).long()[None]
    with torch.no_grad():
        packed_LV = model(input_ids_1L, position_ids=position_ids_1L, use_cache=False).logits[0]
        leaking_LV = model(input_ids_1L, use_cache=False).logits[0]
        end = 0
        for segment in plan[0]:
            alone_1L = torch.from_numpy(ids[segment.row]).long()[None]
            alone_LV = model(alone_1L, use_cache=False).logits[0]
            here = slice(end, end + segment.length)
            torch.testing.assert_close(packed_LV[here], alone_LV, rtol=1e-5, atol=1e-6)
            end += segment.length
    # Control: if positions do not restart, later documents do attend to earlier ones.
    assert (leaking_LV[9:end] - packed_LV[9:end]).abs().max() > 1e-3
