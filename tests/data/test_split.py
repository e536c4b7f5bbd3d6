"""Training and held-out text never overlap, and the order of reading has no influence."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data.documents import Document, content_hash, group_hash
from stillhouse.data.row_pool import Pool
from stillhouse.data.split import check_split, divide
from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.errors import DataError

# Few letters and much whitespace: many texts are equal, exactly or but for whitespace.
texts = st.lists(st.text(alphabet="ab \n", min_size=1, max_size=6), min_size=1, max_size=40)


def pool_of(
    documents: list[str],
    seed: int = 0,
    heldout: int = 10,
    train: int | None = None,
    prune: bool = True,
) -> Pool:
    """A pool in which every character is a token."""
    pool = Pool(seed, heldout, train)
    for text in documents:
        document = Document(text)
        key = pool.admit(group_hash(document), content_hash(document))
        if key is not None:
            ids = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int32)
            pool.add(key, [TokenRow(ids, np.ones(len(ids), dtype=bool), True)])
        if prune:
            pool.prune()
    return pool


def sides(pool: Pool) -> tuple[list[str], list[str]]:
    split = divide(pool.candidates, pool.heldout_tokens, pool.train_tokens)

    def text(index: int, tokens: int) -> str:
        return bytes(pool.row(index).ids[:tokens].astype(np.uint8)).decode("ascii")

    return (
        [text(taken.index, taken.tokens) for taken in split.heldout],
        [text(taken.index, taken.tokens) for taken in split.train],
    )


@given(documents=texts, seed=st.integers(0, 3), heldout=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_no_text_is_on_both_sides(documents: list[str], seed: int, heldout: int) -> None:
    pool = pool_of(documents, seed, heldout)
    held, train = sides(pool)
    train_groups = {" ".join(text.split()) for text in train}
    # The last held-out text may be cut: compare whole documents, by group.
    split = divide(pool.candidates, heldout, None)
    for taken in split.heldout:
        whole = bytes(pool.row(taken.index).ids.astype(np.uint8)).decode("ascii")
        assert " ".join(whole.split()) not in train_groups
    assert sum(map(len, held)) == min(heldout, sum(len(text) for text in set(documents)))
    assert len(set(train)) == len(train)
    assert pool.duplicates_dropped == len(documents) - len(set(documents))


@given(documents=texts, seed=st.integers(0, 3), train=st.none() | st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_order_and_repetition_of_documents_have_no_influence(
    documents: list[str], seed: int, train: int | None
) -> None:
    shuffled = documents + documents[: len(documents) // 2]
    random.Random(seed).shuffle(shuffled)
    assert sides(pool_of(documents, seed, 10, train)) == sides(pool_of(shuffled, seed, 10, train))


@given(documents=texts, heldout=st.integers(1, 15), train=st.integers(1, 15))
@settings(max_examples=200, deadline=None)
def test_releasing_rows_changes_nothing(documents: list[str], heldout: int, train: int) -> None:
    pruned = pool_of(documents, 0, heldout, train)
    assert sides(pruned) == sides(pool_of(documents, 0, heldout, train, prune=False))


def test_a_limited_run_keeps_few_rows_in_memory() -> None:
    documents = [f"document number {n}" for n in range(5000)]
    pool = pool_of(documents, 0, 100, 400)
    assert len(pool.candidates) < 100
    held, train = sides(pool)
    assert sum(map(len, held)) == 100
    assert sum(map(len, train)) == 400


def test_another_seed_gives_another_split() -> None:
    documents = [f"document number {n}" for n in range(50)]
    assert set(sides(pool_of(documents, 0, 100))[0]) != set(sides(pool_of(documents, 1, 100))[0])


def test_one_giant_document_is_rejected() -> None:
    for documents in (["a" * 1000], ["a" * 1000, "b", "c", "d"], ["a", "b" * 900, "c", "d" * 9]):
        pool = pool_of(documents, 0, 20)
        split = divide(pool.candidates, 20, None)
        with pytest.raises(DataError, match="a document is never split") as error:
            check_split(pool.candidates, split, 20, None)
        assert "documents: blank-line" in str(error.value.fix)
        assert "heldout_sources" in str(error.value.fix)


def test_too_little_text_is_rejected() -> None:
    pool = pool_of([f"text {n}" for n in range(10)], 0, 1000)
    split = divide(pool.candidates, 1000, None)
    with pytest.raises(DataError, match="too small to divide"):
        check_split(pool.candidates, split, 1000, None)


def test_a_small_limit_is_not_a_bad_split() -> None:
    pool = pool_of([f"text {n}" for n in range(100)], 0, 200, 10)
    check_split(pool.candidates, divide(pool.candidates, 200, 10), 200, 10)
