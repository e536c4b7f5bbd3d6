"""Training and held-out text never overlap, and the reading order does not matter."""

from __future__ import annotations

import hashlib
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data.documents import Document, content_hash, group_hash
from stillhouse.data.row_pool import HashSet, Pool
from stillhouse.data.split import CANDIDATE, HASH, Records, check_split, divide
from stillhouse.data.token_log import LoggedRow
from stillhouse.errors import DataError

# Few letters and much whitespace, so that many texts are equal or differ only in whitespace.
texts = st.lists(st.text(alphabet="ab \n", min_size=1, max_size=6), min_size=1, max_size=40)


def pool_of(
    documents: list[str],
    seed: int = 0,
    heldout: int = 10,
    train: int | None = None,
    prune: bool = True,
) -> Pool:
    """A pool in which every character is a token, and a row's start is its index in `documents`."""
    pool = Pool(seed, heldout, train)
    for number, text in enumerate(documents):
        document = Document(text)
        key = pool.admit(group_hash(document), content_hash(document))
        if key is not None:
            pool.add(key, [LoggedRow(number, len(text), True, ())])
        if prune:
            pool.prune()
    return pool


def sides(pool: Pool, documents: list[str]) -> tuple[list[str], list[str]]:
    """The held-out and training texts taken from a pool's documents, truncated as in the split."""
    split = divide(pool.candidates, pool.heldout_tokens, pool.train_tokens)
    starts = pool.candidates["start"]
    heldout, train = (
        [documents[starts[index]][:tokens] for index, tokens in taken]
        for taken in (split.heldout, split.train)
    )
    return heldout, train


@given(documents=texts, seed=st.integers(0, 3), heldout=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_no_text_is_on_both_sides(documents: list[str], seed: int, heldout: int) -> None:
    pool = pool_of(documents, seed, heldout)
    held, train = sides(pool, documents)
    train_groups = {" ".join(text.split()) for text in train}
    # The last held-out text may be cut: compare whole documents, by group.
    split = divide(pool.candidates, heldout, None)
    for index in split.heldout["index"]:
        whole = documents[pool.candidates["start"][index]]
        assert " ".join(whole.split()) not in train_groups
    assert sum(map(len, held)) == min(heldout, sum(len(text) for text in set(documents)))
    assert len(set(train)) == len(train)
    assert pool.duplicates_dropped == len(documents) - len(set(documents))


@given(documents=texts, seed=st.integers(0, 3), train=st.none() | st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_the_order_and_repetition_of_documents_do_not_change_the_split(
    documents: list[str], seed: int, train: int | None
) -> None:
    shuffled = documents + documents[: len(documents) // 2]
    random.Random(seed).shuffle(shuffled)
    assert sides(pool_of(documents, seed, 10, train), documents) == sides(
        pool_of(shuffled, seed, 10, train), shuffled
    )


@given(documents=texts, heldout=st.integers(1, 15), train=st.integers(1, 15))
@settings(max_examples=200, deadline=None)
def test_pruning_the_pool_does_not_change_the_split(
    documents: list[str], heldout: int, train: int
) -> None:
    pruned = pool_of(documents, 0, heldout, train)
    whole = pool_of(documents, 0, heldout, train, prune=False)
    assert sides(pruned, documents) == sides(whole, documents)


def test_a_pool_with_a_token_limit_keeps_few_rows() -> None:
    documents = [f"document number {n}" for n in range(5000)]
    pool = pool_of(documents, 0, 100, 400)
    assert len(pool.candidates) < 100
    held, train = sides(pool, documents)
    assert sum(map(len, held)) == 100
    assert sum(map(len, train)) == 400


def test_another_seed_gives_another_split() -> None:
    documents = [f"document number {n}" for n in range(50)]
    first, second = (sides(pool_of(documents, seed, 100), documents) for seed in (0, 1))
    assert set(first[0]) != set(second[0])


def test_one_giant_document_is_rejected() -> None:
    for documents in (["a" * 1000], ["a" * 1000, "b", "c", "d"], ["a", "b" * 900, "c", "d" * 9]):
        pool = pool_of(documents, 0, 20)
        split = divide(pool.candidates, 20, None)
        with pytest.raises(DataError, match="no document is split") as error:
            check_split(pool.candidates, split, 20, None)
        assert "documents: blank-line" in str(error.value.fix)
        assert "heldout_sources" in str(error.value.fix)


def test_too_little_text_is_rejected() -> None:
    pool = pool_of([f"text {n}" for n in range(10)], 0, 1000)
    split = divide(pool.candidates, 1000, None)
    with pytest.raises(DataError, match="too small to divide"):
        check_split(pool.candidates, split, 1000, None)


def test_a_small_token_limit_is_not_rejected() -> None:
    pool = pool_of([f"text {n}" for n in range(100)], 0, 200, 10)
    check_split(pool.candidates, divide(pool.candidates, 200, 10), 200, 10)


# --- compact records ---------------------------------------------------------------------------

rows = st.lists(
    st.tuples(st.sampled_from([b"a", b"b", b"c\0", b"c"]), st.integers(1, 9), st.booleans()),
    max_size=12,
)


def records(rows: list[tuple[bytes, int, bool]]) -> Records:
    """One candidate per row, each from a different document."""
    keys = [
        group.ljust(HASH, b"\0") + bytes([number * 37 % 256]).rjust(HASH, b"\0")
        for number, (group, _, _) in enumerate(rows)
    ]
    found = np.zeros(len(rows), dtype=CANDIDATE)
    for name, values in (
        ("key", keys),
        ("tokens", [tokens for _, tokens, _ in rows]),
        ("splittable", [splittable for _, _, splittable in rows]),
    ):
        found[name] = values
    return found


@given(rows=rows, heldout=st.integers(0, 30), train=st.none() | st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_the_split_matches_a_loop_over_rows(
    rows: list[tuple[bytes, int, bool]], heldout: int, train: int | None
) -> None:
    candidates = records(rows)
    keys = [bytes(key).ljust(2 * HASH, b"\0") for key in candidates["key"]]
    order = sorted(range(len(rows)), key=lambda number: keys[number])
    sides: dict[str, list[tuple[int, int]]] = {"heldout": [], "train": []}
    closed: set[bytes] = set()
    withheld = 0
    for number in order:
        group, (_, tokens, splittable) = keys[number][:HASH], rows[number]
        taken = {name: sum(tokens for _, tokens in side) for name, side in sides.items()}
        held_out = not sides["train"] and (
            group in closed or withheld < heldout  # a group is never split
        )
        if held_out:
            closed.add(group)
            withheld += tokens
        name, limit = ("heldout", heldout) if held_out else ("train", train)
        room = tokens if limit is None else limit - taken[name]
        if room > 0:
            sides[name].append((number, min(tokens, room) if splittable else tokens))
    split = divide(candidates, heldout, train)
    assert split.heldout.tolist() == sides["heldout"]
    assert split.train.tolist() == sides["train"]
    assert split.withheld == withheld


@given(st.lists(st.binary(min_size=1, max_size=2).map(lambda b: b.ljust(HASH, b"\0"))))
@settings(deadline=None)
def test_a_hash_set_behaves_like_a_python_set(hashes: list[bytes]) -> None:
    found, expected = HashSet(newest=3), set[bytes]()
    for hash in hashes:
        assert (hash in found) == (hash in expected)
        assert found.add(hash) == (hash not in expected)
        expected.add(hash)
    assert all(hash in found for hash in expected)


@pytest.mark.run
def test_a_set_of_hashes_takes_little_memory() -> None:
    tracemalloc.start()
    found = HashSet(newest=1000)
    for number in range(30_000):
        found.add(hashlib.sha256(b"%d" % number).digest())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 30_000 < 45  # a Python set takes more than 100


@given(
    own=texts,
    others=texts,
    seed=st.integers(0, 3),
    limit=st.integers(1, 40),
    heldout=st.integers(1, 30),
)
@settings(max_examples=200, deadline=None)
def test_no_text_of_a_limited_source_is_on_both_sides(
    own: list[str], others: list[str], seed: int, limit: int, heldout: int
) -> None:
    documents = own + others
    pool = Pool(seed, heldout, None)
    part = pool.of_source(limit)
    for number, text in enumerate(documents):
        if number == len(own):
            pool.take(part)
        target, document = part if number < len(own) else pool, Document(text)
        key = target.admit(group_hash(document), content_hash(document))
        if key is not None:
            target.add(key, [LoggedRow(number, len(text), True, ())])
        target.prune()
    split = divide(pool.candidates, heldout, None)
    held, train = (
        {" ".join(documents[pool.candidates["start"][index]].split()) for index in taken["index"]}
        for taken in (split.heldout, split.train)
    )
    assert not held & train
    of_part = [row["tokens"] for row in pool.candidates if row["start"] < len(own)]
    enough = sum(map(len, set(own))) >= limit
    assert (sum(of_part) >= limit) if enough else (sum(of_part) == sum(map(len, set(own))))
    assert sum(of_part) < limit + max(map(len, own))


def test_held_out_and_training_text_have_equal_shares_of_a_limited_source() -> None:
    """The pool takes a tenth of one source, and all of another that is as large as that tenth."""
    pool = Pool(0, 5_000, None)
    part = pool.of_source(10_000)
    for target, count, name in ((part, 10_000, "a"), (pool, 1_000, "b")):
        for number in range(count):
            document = Document(f"{name} {number}")
            key = target.admit(group_hash(document), content_hash(document))
            if key is not None:
                target.add(key, [LoggedRow(number + 20_000 * (name == "b"), 10, True, ())])
            target.prune()
        if target is part:
            pool.take(part)
    split = divide(pool.candidates, 5_000, None)
    starts = pool.candidates["start"]
    shares = [
        float((starts[side["index"]] < 20_000).mean()) for side in (split.heldout, split.train)
    ]
    assert len(split.heldout) + len(split.train) == 2_000
    assert all(0.45 < share < 0.55 for share in shares)
