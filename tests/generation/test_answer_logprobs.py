"""Signals from the log-probabilities that an API returns for the tokens of its answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stillhouse
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.errors import RecipeError, SignalError
from stillhouse.generation.answer_logprobs import (
    ByteVocabulary,
    align,
    entry_rows,
    mean_log_probability,
)
from stillhouse.generation.request import Answer
from stillhouse.pipeline.kind import RunResult
from stillhouse.signals.manifest import read_manifest
from stillhouse.signals.segments import find_segments
from stillhouse.signals.signal_types import SparseSignal
from stillhouse.signals.store import open_store
from stillhouse.signals.verify import verify
from stillhouse.training.checkpoints import read_metrics
from tests import tiny
from tests.generation.stub import Reply, Stub
from tests.synthesis.test_in_a_run import api, recipe

pytestmark = pytest.mark.run

K = 5
LENGTH = 6
MODEL, TOKENIZER = tiny.llama(seed=7), tiny.tokenizer()
LETTERS = TOKENIZER("abcdefghij")["input_ids"]
BYTES_OF = ByteVocabulary.of(TOKENIZER, 10**6).bytes_of


def reported_at(token: int, log_probs_V: torch.Tensor) -> dict[str, Any]:
    """One position of an answer as servers report it: strings and bytes, without token ids."""
    best = log_probs_V.topk(K)

    def one(i: int) -> dict[str, Any]:
        text = TOKENIZER.decode([i])
        return {"token": text, "bytes": list(BYTES_OF[i]), "logprob": float(log_probs_V[i])}

    return {**one(token), "top_logprobs": [one(i) for i in best.indices.tolist()]}


def ask_the_model(payload: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """A teacher with a known distribution: it writes a tiny model's most likely letters."""
    ids = prompt_ids(payload["messages"])
    positions = []
    for _ in range(LENGTH):
        log_probs_V = MODEL(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)
        token = max(LETTERS, key=lambda i: float(log_probs_V[i]))
        positions.append(reported_at(token, log_probs_V))
        ids = [*ids, token]
    return "".join(position["token"] for position in positions), positions


def prompt_ids(messages: list[dict[str, str]]) -> list[int]:
    encoded = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def script(number: int, payload: dict[str, Any]) -> Reply:
    text, positions = ask_the_model(payload)
    assert payload["logprobs"] is True
    assert payload["top_logprobs"] == K
    return Reply(text=text, logprobs=positions)


def soft(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    section = {"sampling": {"max_tokens": 8, "top_logprobs": K}}
    return recipe(folder, api(url), synthesize=section, **{"signals": {"answers": {}}, **changes})


def run(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    result = stillhouse.run(raw, base=folder)
    assert isinstance(result, RunResult)
    return {stage.name: stage for stage in result.stages}


def test_the_store_contains_the_teachers_top_tokens_and_their_tail(tmp_path: Path) -> None:
    with Stub(script) as stub:
        raw = soft(tmp_path, stub.url, train={"max_steps": 2, "evaluate_every": 1})
        stages = run(tmp_path, raw)
        assert len(stub.payloads) == 80
        assert all(stage.reused for stage in run(tmp_path, raw).values())
    facts = stages["signals"].summary
    assert (facts["answers"], facts["mismatched"]) == (80, 0)
    assert (facts["tokens"], facts["reported"]) == (80 * (LENGTH + 1), 80 * LENGTH)
    store = open_store(stages["signals"].path / "store")
    assert verify(store.path) == []
    rows = [
        json.loads(line)["messages"]
        for line in (tmp_path / "synthetic.jsonl").read_text().splitlines()
    ]
    for messages in rows[:10]:
        prompt = prompt_ids(messages[:-1])
        answer = TOKENIZER(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        ids_1L = torch.tensor([[*prompt, *answer, TOKENIZER.eos_token_id]])
        labels_1L = ids_1L.clone()
        labels_1L[:, : len(prompt)] = -100
        signal = store.read(find_segments(ids_1L, labels_1L))
        assert isinstance(signal, SparseSignal)
        p_NV = MODEL(ids_1L).logits[0, len(prompt) - 1 : -1].detach().softmax(-1)
        best = p_NV.topk(K)
        stored_NK = signal.log_probs_NK.exp()
        assert signal.ids_NK[:LENGTH].tolist() == best.indices[:LENGTH].tolist()
        torch.testing.assert_close(stored_NK[:LENGTH], best.values[:LENGTH], rtol=2e-3, atol=0)
        tail_N = 1 - best.values.sum(-1)
        torch.testing.assert_close(signal.tail_N[:LENGTH], tail_N[:LENGTH], rtol=0, atol=1e-6)
        # The end of the turn is not reported, so it is stored with probability 1.
        assert int(signal.ids_NK[LENGTH, 0]) == TOKENIZER.eos_token_id
        assert stored_NK[LENGTH].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert float(signal.tail_N[LENGTH]) == 0.0
    assert read_metrics(stages["train"].path / "metrics.jsonl")[0]["loss"] > 0
    provenance = read_manifest(store.path).settings.provenance
    assert provenance["reported"] == "480 of 560 tokens"
    assert "have all the mass themselves" in provenance["bias"]
    assert provenance["asked"] == f"teacher at {stub.url}"


def two_at_a_time(number: int, payload: dict[str, Any]) -> Reply:
    """The tokens of every second answer are pairs of letters."""
    text, positions = ask_the_model(payload)
    if number % 2:
        positions = [
            {**one, "token": text[at : at + 2], "bytes": list(text[at : at + 2].encode())}
            for at, one in enumerate(positions)
            if at % 2 == 0
        ]
    return Reply(text=text, logprobs=positions)


def test_answers_that_are_tokenized_differently_are_counted_and_rejected(tmp_path: Path) -> None:
    with Stub(two_at_a_time) as stub:
        raw = soft(tmp_path, stub.url)
        with pytest.raises(
            SignalError, match="40 of 80 answers are tokenized differently"
        ) as caught:
            run(tmp_path, raw)
        assert "signals.answers.mismatched" in str(caught.value.fix)
        raw["signals"]["answers"]["mismatched"] = 0.5
        facts = run(tmp_path, raw)["signals"].summary
    assert (facts["mismatched"], facts["reported"]) == (40, 40 * LENGTH)


# --- one answer --------------------------------------------------------------------------------

WORDS = ByteVocabulary.of(TOKENIZER, 10**6)


def row(prompt: str, answer: str) -> TokenRow:
    before = prompt_ids([{"role": "user", "content": prompt}])
    after = [*TOKENIZER(answer)["input_ids"], TOKENIZER.eos_token_id]
    ids = np.array([*before, *after], dtype=np.int32)
    return TokenRow(ids, np.arange(len(ids)) >= len(before), False)


def positions(text: str, *, p: float = 0.5) -> list[dict[str, Any]]:
    """One token per character, with probability p; `z` has probability 0.25 at each position."""

    def one(token: str, probability: float) -> dict[str, Any]:
        return {"token": token, "bytes": None, "logprob": math.log(probability)}

    return [{**one(c, p), "top_logprobs": [one("z", 0.25), one(c, p)]} for c in text]


def first_ids(aligned: Any) -> str:
    return TOKENIZER.decode([next(iter(entries)) for entries in aligned.entries])


def test_tokens_of_the_kept_part_of_an_answer_are_found() -> None:
    """Reasoning before it is skipped; the end of the turn after it is used if it is reported."""
    end = {**positions("e")[0], "token": "<|end|>"}
    given = [*positions("<think>ab</think>"), *positions("ab"), end]
    aligned = align(row("q", "ab"), "ab", given, 5, WORDS)
    assert aligned.matched
    assert aligned.reported == [True, True, True]
    assert first_ids(aligned) == "abe"
    assert [list(entries.values()) for entries in aligned.entries[:2]] == [
        [math.log(0.5), math.log(0.25)]
    ] * 2


def test_tokens_outside_the_students_vocabulary_stay_in_the_tail() -> None:
    given = positions("a")
    given[0]["top_logprobs"].append({"token": "\ufffd", "bytes": None, "logprob": math.log(0.1)})
    given[0]["top_logprobs"].append({"token": "xyz", "bytes": None, "logprob": math.log(0.1)})
    aligned = align(row("q", "a"), "a", given, 5, WORDS)
    rows, statistics = entry_rows(aligned.entries, len(TOKENIZER))
    assert rows.counts_N.tolist() == [2, 1]
    assert rows.tail_N is not None
    assert rows.tail_N.tolist() == pytest.approx([0.25, 0.0])
    assert statistics.mass == pytest.approx(1.75)


def test_parts_of_a_character_that_a_server_cannot_show_are_matched() -> None:
    """llama-cpp-python returns only text, and drops bytes of incomplete characters."""
    given = positions("a?")[:1] + [
        {"token": "", "bytes": None, "logprob": math.log(0.5), "top_logprobs": [
            {"token": "", "bytes": None, "logprob": math.log(0.5)},
            {"token": "", "bytes": None, "logprob": math.log(0.125)},
            {"token": "b", "bytes": None, "logprob": math.log(0.25)},
        ]}
        for _ in range(2)
    ]  # fmt: skip
    aligned = align(row("q", "aä"), "aä", given, 5, WORDS)
    assert aligned.matched
    first, second = TOKENIZER("ä")["input_ids"]
    b = TOKENIZER("b")["input_ids"][0]
    # The generated token is known; another token without text stays in the tail.
    assert aligned.entries[1] == {first: math.log(0.5), b: math.log(0.25)}
    assert aligned.entries[2] == {second: math.log(0.5), b: math.log(0.25)}


@pytest.mark.parametrize("text", ["ab", "ax", "xbc", ""])
def test_log_probabilities_of_different_text_or_none_do_not_match(text: str) -> None:
    aligned = align(row("q", "abc"), "abc", positions(text), 5, WORDS)
    assert not aligned.matched
    assert not any(aligned.reported)
    assert first_ids(aligned) == "abc<|end|>"
    assert all(list(entries.values()) == [0.0] for entries in aligned.entries)


def test_invalid_probabilities_are_rejected() -> None:
    with pytest.raises(SignalError, match=r"sum to 1\.15"):
        align(row("q", "a"), "a", positions("a", p=0.9), 5, WORDS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"synthesize": {"sampling": {}}}, "top_logprobs to 1 to 20"),
        ({"signals": {"answers": {}, "encoding": {"kind": "top_k"}}}, "remove encoding"),
        ({"signals": {"answers": {}, "store": "x"}}, "remove encoding, server, vllm, and store"),
    ],
)
def test_conflicting_keys_are_rejected(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    raw = soft(tmp_path, "http://127.0.0.1:1/v1")
    for key, section in changes.items():
        raw[key] = {**raw[key], **section}
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(raw)


@pytest.mark.parametrize(
    "damage",
    [
        {"logprob": None},
        {"logprob": "-1"},
        {"logprob": -(10**400)},
        {"bytes": [999]},
        {"top_logprobs": [{"token": "b"}]},
        {"top_logprobs": [7]},
        {"top_logprobs": 7},
    ],
)
def test_a_malformed_position_of_an_old_journal_counts_as_not_reported(damage: Any) -> None:
    given = positions("abc")
    given[1] |= damage
    aligned = align(row("q", "abc"), "abc", given, 5, WORDS)
    assert aligned.matched
    assert aligned.reported == [True, False, True, False]
    assert aligned.entries[1] == {TOKENIZER("b")["input_ids"][0]: 0.0}
    assert mean_log_probability(Answer("abc", logprobs=given)) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("given", [[None, 7, "x"], [{}, [], {"token": 5}]])
def test_positions_without_a_token_match_nothing(given: list[Any]) -> None:
    assert not align(row("q", "abc"), "abc", given, 5, WORDS).matched
    assert mean_log_probability(Answer("abc", logprobs=given)) is None
