"""Likelihoods of chunks of answers, from the log-probabilities of an API with another tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.check import check_recipe
from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.errors import SignalError
from stillhouse.generation.answer_logprobs import (
    UNKNOWN,
    ByteVocabulary,
    ChunkedAnswer,
    align_chunks,
    chunk_rows,
)
from stillhouse.signals import ChunkSignal
from stillhouse.signals.encodings import AnswerChunks
from stillhouse.signals.manifest import Settings, read_manifest
from stillhouse.signals.parquet_export import export_parquet
from stillhouse.signals.segments import find_segments
from stillhouse.signals.store import open_store
from stillhouse.signals.verify import verify
from stillhouse.signals.writer import StoreWriter
from stillhouse.training.checkpoints import read_metrics
from tests.generation.stub import Reply, Stub
from tests.generation.test_answer_logprobs import (
    LENGTH,
    ask_the_model,
    prompt_ids,
    run,
    soft,
    two_at_a_time,
)
from tests.generation.test_answer_logprobs import row as letters
from tests.teachers.tokenizer_toys import byte_level

WORDS = byte_level(300)
CHUNKS = [{"kind": "chunks"}, {"divergence": "cross_entropy", "weight": 0.1}]


def row(answer: str) -> TokenRow:
    """A prompt of one token, the answer, and the end of the turn."""
    ids = [5, *WORDS(answer, add_special_tokens=False)["input_ids"], WORDS.eos_token_id]
    return TokenRow(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0, False)


def api(*tokens: str | bytes, log_p: float = -0.5) -> list[dict[str, Any]]:
    """The API's positions for these tokens, with log-probabilities log_p, 2 log_p, 3 log_p, ..."""
    given = [one.encode() if isinstance(one, str) else one for one in tokens]
    return [
        {"token": one.decode("utf-8", "replace"), "bytes": list(one), "logprob": log_p * (n + 1)}
        for n, one in enumerate(given)
    ]


def chunks(answer: str, given: list[dict[str, Any]]) -> dict[str, float]:
    """The log-likelihood of each chunk, by its text."""
    found = align_chunks(row(answer), answer, given, ByteVocabulary.of(WORDS, len(WORDS)))
    parts: list[tuple[list[int], float]] = []
    for i, log_p, reported in zip(found.ids, found.log_probs, found.reported, strict=True):
        if log_p is not None:
            parts.append(([], log_p))
        if reported:
            parts[-1][0].append(i)
    assert found.matched == bool(parts)
    return {WORDS.decode(ids): log_p for ids, log_p in parts}


def students_tokens(text: str) -> list[str]:
    ids = WORDS(text, add_special_tokens=False)["input_ids"]
    return [WORDS.decode([i]) for i in ids]


def test_chunks_begin_where_both_tokenizers_begin_a_token() -> None:
    answer = "the cat sat"
    assert students_tokens(answer) == ["the", " cat", " ", "s", "a", "t"]
    found = chunks(answer, api("t", "he c", "at", " s", "at"))
    assert found == pytest.approx({"the cat": -0.5 - 1 - 1.5, " s": -2.0, "at": -2.5})


def test_each_token_is_a_chunk_if_the_tokenizers_agree() -> None:
    found = chunks("the cats", api(*students_tokens("the cats")))
    assert found == pytest.approx({"the": -0.5, " cat": -1.0, "s": -1.5})


def test_the_text_is_found_between_reasoning_and_trailing_whitespace() -> None:
    given = api("<think>", "the cat", "</think>", "\n\n", "the", " cat", "\n")
    assert chunks("the cat", given) == pytest.approx({"the": -2.5, " cat": -3.0})


def test_text_that_begins_inside_a_token_has_no_chunk_before_the_next_boundary() -> None:
    assert chunks("the cat", api("\nthe", " cat")) == pytest.approx({" cat": -1.0})


def test_a_character_may_be_divided_between_tokens() -> None:
    first, second = "ä".encode()[:1], "ä".encode()[1:]
    found = chunks("the ä", api("the", b" " + first, second))
    assert found == pytest.approx({"the": -0.5, " \ufffd": -1.0, "\ufffd": -1.5})


@pytest.mark.parametrize("log_p", [UNKNOWN, None, "x", -math.inf, 0.5])
def test_a_chunk_with_an_unknown_log_probability_is_left_out(log_p: Any) -> None:
    given = api("the", " ca", "t", " s", "at")
    given[2]["logprob"] = log_p
    assert chunks("the cat sat", given) == pytest.approx({"the": -0.5, " s": -2.0, "at": -2.5})


@pytest.mark.parametrize("given", [None, [], api("the dog"), api("the"), [None, 7, {}]])
def test_log_probabilities_of_different_text_yield_no_chunks(given: Any) -> None:
    assert chunks("the cat", given) == {}


@pytest.mark.parametrize(("kept", "expected"), [(4, [-1.0, None, -2.0, None]), (3, [-1.0, None])])
def test_a_chunk_that_is_cut_off_is_left_out(kept: int, expected: list[float | None]) -> None:
    whole = ChunkedAnswer(
        [1, 2, 3, 4, 5], [-1.0, None, -2.0, None, None], [True] * 4 + [False], True
    )
    found = whole.first(kept)
    dropped = kept - len(expected)
    assert found.log_probs == [*expected, *[None] * dropped]
    assert found.reported == [True] * len(expected) + [False] * dropped


# --- the store ---------------------------------------------------------------------------------


@st.composite
def answers(draw: st.DrawFn) -> ChunkedAnswer:
    runs = draw(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6))
    log_probs: list[float | None] = []
    reported: list[bool] = []
    for length, known in runs:
        log_p = draw(st.floats(-60, 0, width=16)) if known else None
        log_probs += [log_p, *[None] * (length - 1)]
        reported += [known] * length
    ids = draw(st.lists(st.integers(0, 69_999), min_size=len(reported), max_size=len(reported)))
    return ChunkedAnswer(ids, log_probs, reported, any(reported))


@pytest.mark.run
@given(st.lists(answers(), min_size=1, max_size=4))
def test_a_store_returns_the_chunks_of_all_rows(found: list[ChunkedAnswer]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        settings = Settings(AnswerChunks(), 70_000, {})
        segments = []
        with StoreWriter(Path(name), settings) as writer:
            for number, one in enumerate(found):
                ids_1L = torch.tensor([[number, *one.ids]])
                labels_1L = ids_1L.clone()
                labels_1L[0, 0] = -100
                segments.append((ids_1L, labels_1L))
                writer.add(find_segments(ids_1L, labels_1L), *chunk_rows(one, 70_000))
            writer.finish()
        assert verify(Path(name)) == []
        store, expected = open_store(Path(name)), []
        for one, arrays in zip(found, segments, strict=True):
            signal = store.read(find_segments(*arrays))
            assert isinstance(signal, ChunkSignal)
            assert signal.rows_P.tolist() == np.flatnonzero(one.reported).tolist()
            begins = [n for n, log_p in enumerate(one.log_probs) if log_p is not None]
            assert signal.log_probs_C.tolist() == [one.log_probs[n] for n in begins]
            first = np.searchsorted(begins, signal.rows_P, side="right") - 1
            assert signal.chunk_P.tolist() == first.tolist()
            expected += signal.log_probs_C.tolist()
        assert export_parquet(Path(name), Path(name) / "all.parquet") == sum(
            len(one.ids) for one in found
        )


# --- a run -------------------------------------------------------------------------------------


@pytest.mark.run
def test_a_student_learns_the_likelihoods_of_an_apis_chunks(tmp_path: Path) -> None:
    """The tokens of every second answer are pairs of letters."""
    with Stub(two_at_a_time) as stub:
        raw = soft(tmp_path, stub.url, objective={"terms": CHUNKS}, train={"max_steps": 2})
        stages = run(tmp_path, raw)
        texts = [one.text for one in check_recipe(raw, base=tmp_path) if one.topic == "signals"]
        assert "as likelihoods of the text" in texts[0]
        assert all(stage.reused for stage in run(tmp_path, raw).values())
    facts = stages["signals"].summary
    assert (facts["answers"], facts["mismatched"]) == (80, 0)
    assert (facts["tokens"], facts["reported"]) == (80 * (LENGTH + 1), 80 * LENGTH)
    store = open_store(stages["signals"].path / "store")
    assert verify(store.path) == []
    assert read_manifest(store.path).settings.encoding == AnswerChunks()
    sizes = set()
    for line in (tmp_path / "synthetic.jsonl").read_text().splitlines()[:10]:
        messages = json.loads(line)["messages"]
        _, told = ask_the_model({"messages": messages[:-1]})
        log_p = [one["logprob"] for one in told]
        known = letters(messages[0]["content"], messages[-1]["content"])
        assert known.ids.tolist()[: -LENGTH - 1] == prompt_ids(messages[:-1])
        ids_1L = torch.from_numpy(known.ids[None].astype(np.int64))
        labels_1L = ids_1L.masked_fill(torch.from_numpy(~known.supervised[None]), -100)
        signal = store.read(find_segments(ids_1L, labels_1L))
        assert isinstance(signal, ChunkSignal)
        size = LENGTH // len(signal.log_probs_C)
        sizes.add(size)
        assert signal.rows_P.tolist() == list(range(LENGTH))
        assert signal.chunk_P.tolist() == [n // size for n in range(LENGTH)]
        # The pairs of `two_at_a_time` have the log-probability of their first letter.
        assert signal.log_probs_C.tolist() == pytest.approx(log_p[::size], rel=1e-3)
    assert sizes == {1, 2}
    metrics = read_metrics(stages["train"].path / "metrics.jsonl")[0]
    assert metrics["chunks binary"] > 0


@pytest.mark.run
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"terms": [*CHUNKS, {"divergence": "forward_kl"}]}}, "forward_kl compares"),
        (
            {"objective": {"terms": CHUNKS}, "signals": {"answers": {}, "missing": "live"}},
            "cannot score the text that signals.answers lacks",
        ),
    ],
)
def test_sections_that_conflict_with_chunks_are_rejected_before_any_request(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    def never(number: int, payload: dict[str, Any]) -> Reply:
        raise AssertionError

    with Stub(never) as stub:
        raw = soft(tmp_path, stub.url, **changes)
        with pytest.raises(SignalError, match=message):
            run(tmp_path, raw)
        assert stub.payloads == []


@pytest.mark.run
def test_answers_that_differ_from_their_tokens_are_counted_and_rejected(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        text, positions = ask_the_model(payload)
        return Reply(text=text, logprobs=positions[: -1 if number % 2 else None])

    with Stub(script) as stub:
        raw = soft(tmp_path, stub.url, objective={"terms": CHUNKS})
        with pytest.raises(SignalError, match="40 of 80 answers have no log-probabilities for"):
            run(tmp_path, raw)
