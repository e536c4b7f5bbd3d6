"""Choosing among several answers to a prompt by majority, the teacher's likelihood, or a judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse.commands import synthesize_text
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import RecipeError, RunError
from stillhouse.generation.answer_logprobs import mean_log_probability
from stillhouse.generation.local_generator import local_text
from stillhouse.generation.request import Answer, Request
from stillhouse.synthesis.filters import Filters, Row, Sieve
from stillhouse.synthesis.judge_answers import likelihood, majority, normalized
from stillhouse.synthesis.synthesize import Synthesis, chosen_filters
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from tests import tiny
from tests.generation.stub import Reply, Stub, error


def row(text: str, sample: int = 0, **changes: Any) -> Row:
    facts = {"finish_reason": "stop", "where": "p.txt:1", **changes}
    return Row(({"role": "user", "content": "a question"},), text, sample=sample, **facts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("42", " 42. "),
        ("1,000", "1000.0"),
        ("$1,234,567", "1234567"),
        ("**Paris**", "paris"),
        ("New  York\n", "new york"),
        ("０", "0.00"),
        ("-5", "-5.0"),
        (f"{2**100}.0", f"{2**100:,}"),
    ],
)
def test_equivalent_answers_are_normalized_to_the_same_text(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "5"),
        ("1,5", "15"),
        ("10%", "10"),
        ("a", "b"),
        (f"{2**100}", f"{2**100 + 1}"),
        ("1e99999999999", "1e99999999998"),
    ],
)
def test_different_answers_are_normalized_to_different_texts(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)


TEXTS = [
    "6 x 7 is 41",
    "I think of 6, of 7, and of the answer: 42",
    "<think>41? no</think> It is 42.",
    "no idea",
]


def test_majority_keeps_the_first_answer_that_agrees_or_all_of_them() -> None:
    rows = [row(text, number) for number, text in enumerate(TEXTS)]
    once = majority(r"\d+", "filters")(rows)
    assert [reason is None for reason in once] == [False, True, False, False]
    assert once[0] == "its answer is '41', and 2 of 4 are '42'"
    assert once[2] == "it is the same as an earlier answer"
    assert once[3] is not None
    assert "nothing in it matches" in once[3]
    every = majority(r"(?:is|answer:) (\d+)", "filters", keep_all=True)(rows)
    assert [reason is None for reason in every] == [False, True, True, False]


def test_majority_drops_all_answers_if_too_few_agree() -> None:
    rows = [row(text) for text in ("1", "2", "2", "3")]
    assert [reason is None for reason in majority(None, "filters")(rows)] == [
        False,
        True,
        False,
        False,
    ]
    assert None not in majority(None, "filters", least=0.6)(rows)
    assert None in majority(None, "filters", least=0.5)(rows)
    first = majority(None, "filters")([row("1"), row("2")])
    assert first[0] is None, "ties go to the answer that came first"


def test_the_most_likely_answer_is_kept() -> None:
    values = [-2.0, None, -0.5, -0.5]
    reasons = likelihood()([row("x", likelihood=value) for value in values])
    assert [reason is None for reason in reasons] == [False, False, True, False]
    assert reasons[1] == "the teacher gave no log-probabilities"
    assert likelihood()([]) == []


def test_best_of_runs_after_the_single_answer_filters_and_before_the_duplicate_filters(
    tmp_path: Path,
) -> None:
    """It chooses among the answers to each prompt that earlier filters kept; later filters see only
    the chosen answers."""
    rows = [
        row("bad", 0),
        row("bad", 1),
        row("7", 2),
        row("8", 0, where="p.txt:2"),
        row("9", 1, where="p.txt:2"),
        row("9", 2, where="p.txt:2"),
    ]
    before = {"words": lambda r: "a word" if r.text.isalpha() else None}
    seen: list[str] = []

    def remember(one: Row) -> None:
        seen.append(one.text)

    filters = Filters(before, majority(None, "filters"), {"remember": remember})
    sieve = Sieve(filters, tmp_path / "dropped.jsonl")
    assert [r.text for r in sieve.keep(rows)] == ["7", "9"]
    assert sieve.dropped == {"words": 2, "best_of": 2, "remember": 0}
    assert seen == ["7", "9"]


def test_a_local_model_returns_the_log_probability_of_its_tokens() -> None:
    """Greedy answers are compared with forward passes over the complete sequence; of sampled ones,
    only the number of log-probabilities is checked."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    asked = [
        Request(
            "local",
            "m",
            ({"role": "user", "content": f"question {number}"},),
            {"max_tokens": 6, "temperature": 0.7 * (number % 2), "logprobs": True, "seed": 0},
        )
        for number in range(4)
    ]
    for request, answer in local_text(model, tokenizer, batch=2).answers(asked):
        assert isinstance(answer, Answer)
        assert answer.logprobs is not None
        prompt = tokenizer.apply_chat_template(
            [dict(m) for m in request.messages], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        log_probs = [entry["logprob"] for entry in answer.logprobs]
        assert len(log_probs) == answer.completion_tokens
        # Tokenizing the text may not restore the tokens, so decode greedily again.
        if request.parameters["temperature"] == 0:
            ids = list(prompt)
            for value in log_probs:
                logits_V = model(torch.tensor([ids])).logits[0, -1].detach()
                best = logits_V.log_softmax(-1).max(-1)
                assert value == pytest.approx(float(best.values), abs=1e-4)
                ids.append(int(best.indices))


# --- complete synthesis --------------------------------------------------------------------------


def synthesized(folder: Path, url: str, best_of: dict[str, Any], **changes: Any) -> Synthesis:
    (folder / "prompts.txt").write_text("question 0\nquestion 1\nquestion 2\n")
    section = {
        "teacher": {"api": {"base_url": url, "model": "teacher"}},
        "prompts": {"path": "prompts.txt", "samples": 3},
        "sampling": {"max_tokens": 20},
        "filters": {"best_of": best_of},
        **changes,
    }
    raw = tiny.recipe(folder, folder=str(folder / "runs" / "tiny"), synthesize=section)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    found = synthesize_text(path)
    assert found is not None
    return found


def answers(result: Synthesis) -> list[str]:
    lines = result.out.read_text().splitlines()
    return [json.loads(line)["messages"][-1]["content"] for line in lines]


def numbered(number: int, payload: dict[str, Any]) -> Reply:
    """The nth answer to a prompt is `answer n`; later answers are more likely."""
    asked = payload["messages"][-1]["content"]
    nth = SAMPLES.setdefault(asked, [])
    nth.append(number)
    entries = [{"token": "x", "logprob": math.log(0.1 * len(nth))}] * 2
    return Reply(text=f"answer {len(nth)}", logprobs=entries if payload.get("logprobs") else None)


SAMPLES: dict[str, list[int]] = {}


def test_the_most_likely_answer_of_an_api_is_kept(tmp_path: Path) -> None:
    SAMPLES.clear()
    with Stub(numbered) as stub:
        result = synthesized(tmp_path, stub.url, {"kind": "likelihood"})
        assert all(payload["logprobs"] is True for payload in stub.payloads)
    assert answers(result) == ["answer 3"] * 3
    assert result.dropped["best_of"] == 6


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ([{"logprob": -1.0}, {"logprob": None}, {"token": "x"}, "x", {"logprob": -2}], -1.5),
        ([{"logprob": None}], None),
        (None, None),
    ],
)
def test_the_mean_log_probability_skips_tokens_without_one(
    logprobs: list[Any] | None, expected: float | None
) -> None:
    assert mean_log_probability(Answer("x", logprobs=logprobs)) == expected


def judged(number: int, payload: dict[str, Any]) -> Reply:
    """A teacher, and a judge that prefers `answer 2`, or else the answer that it reads first."""
    if payload["model"] == "teacher":
        return numbered(number, payload)
    question = payload["messages"][-1]["content"]
    if "[Answer]" in question:
        score = "<think>7 or 8?</think>9" if "answer 2" in question else "Score: 4/10"
        return Reply(text=score)
    first, _, second = question.partition("[Answer B]")
    return Reply(text="B" if "answer 2" in second and "answer 2" not in first else "A")


@pytest.mark.parametrize(
    ("compare", "verdicts"), [("scores", 3 * 3), ("pairs", 3 * 6)], ids=["scores", "pairs"]
)
def test_the_answer_that_a_judge_prefers_is_kept(
    tmp_path: Path, compare: str, verdicts: int
) -> None:
    SAMPLES.clear()
    with Stub(judged, models=("teacher", "judge")) as stub:
        price = {"input": 1.0, "output": 1.0}
        judge = {"api": {"base_url": stub.url, "model": "judge", "price": price}}
        best_of = {"kind": "judge", "teacher": judge, "compare": compare, "criteria": "It is even."}
        result = synthesized(tmp_path, stub.url, best_of)
        questions = [p["messages"][-1]["content"] for p in stub.payloads if p["model"] == "judge"]
        assert len(questions) == verdicts
        assert all("It is even." in q and "user" not in q.split("[")[0] for q in questions)
        asked = len(stub.payloads)
        assert synthesized(tmp_path, stub.url, best_of).kept == 3
        assert len(stub.payloads) == asked, "the journal contains the verdicts too"
    assert answers(result) == ["answer 2"] * 3
    assert (result.judged, result.unjudged, result.judge_tokens) == (verdicts, 0, 15 * verdicts)
    assert result.judge_usd == pytest.approx(15 * verdicts / 1e6)
    row = json.loads(result.dropped_rows.read_text().splitlines()[0])
    points = {"scores": "it 4, and the best 9", "pairs": "it 0.5, and the best 2"}[compare]
    assert row["reason"] == f"the judge gives {points}"


def test_the_sampling_of_a_judge_can_be_set(tmp_path: Path) -> None:
    SAMPLES.clear()
    with Stub(judged, models=("teacher", "judge")) as stub:
        best_of = {"kind": "judge", "teacher": {"api": {"base_url": stub.url, "model": "judge"}}}
        synthesized(tmp_path, stub.url, best_of)
        sampling = {"temperature": None, "max_tokens": 300, "extra": {"reasoning_effort": "low"}}
        synthesized(tmp_path, stub.url, {**best_of, "sampling": sampling})
        sent = [payload for payload in stub.payloads if payload["model"] == "judge"]
    assert (sent[0]["temperature"], sent[0]["max_tokens"]) == (0.0, 16)
    assert (sent[-1]["max_tokens"], sent[-1]["reasoning_effort"]) == (300, "low")
    assert "temperature" not in sent[-1]


def test_an_answer_without_a_verdict_is_dropped_and_judged_in_the_next_run(tmp_path: Path) -> None:
    SAMPLES.clear()
    broken = True

    def script(number: int, payload: dict[str, Any]) -> Reply:
        if payload["model"] == "judge" and broken and "answer 2" in str(payload["messages"]):
            return error(400, "no")
        return judged(number, payload)

    with Stub(script, models=("teacher", "judge")) as stub:
        best_of = {
            "kind": "judge",
            "teacher": {"api": {"base_url": stub.url, "model": "judge"}},
        }
        first = synthesized(tmp_path, stub.url, best_of)
        assert dict(first.lines())["judge"] == "6 verdicts (3 missing), 90 tokens, cost unknown"
        assert (first.judged, first.unjudged) == (6, 3)
        assert answers(first) == ["answer 1"] * 3
        broken = False
        assert answers(synthesized(tmp_path, stub.url, best_of)) == ["answer 2"] * 3


def test_the_error_names_a_judges_budget_that_suffices_for_no_verdict(tmp_path: Path) -> None:
    SAMPLES.clear()
    with Stub(judged, models=("teacher", "judge")) as stub:
        judge = {"api": {"base_url": stub.url, "model": "judge"}}
        best_of = {"kind": "judge", "teacher": judge, "budget": {"max_tokens": 1}}
        with pytest.raises(RunError, match="no answer has a verdict") as caught:
            synthesized(tmp_path, stub.url, best_of)
    assert str(caught.value.fix).startswith("raise synthesize.filters.best_of.budget;")


@pytest.mark.parametrize(
    ("best_of", "samples", "expected"),
    [
        ({"kind": "likelihood"}, 1, "set prompts.samples"),
        ({"kind": "votes"}, 2, "kind"),
        ({"kind": "majority", "pattern": "("}, 2, "not a regular expression"),
        (
            {"kind": "judge", "teacher": {"local": {}}, "budget": {"max_usd": 1}},
            2,
            "a budget is for teacher.api",
        ),
    ],
)
def test_an_invalid_best_of_section_is_rejected(
    tmp_path: Path, best_of: dict[str, Any], samples: int, expected: str
) -> None:
    section = {
        "teacher": {"api": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}},
        "prompts": {"path": "prompts.txt", "samples": samples},
        "filters": {"best_of": best_of},
    }
    with pytest.raises(RecipeError, match=expected):
        chosen_filters(parse_section(tmp_path, section).filters, tmp_path, "synthesize.filters")


def parse_section(folder: Path, section: dict[str, Any]) -> SynthesizeRecipe:
    found = parse_recipe(tiny.recipe(folder, synthesize=section)).synthesize
    assert found is not None
    return found
