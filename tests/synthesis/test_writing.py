"""Prompts that are not read from a file: combined from templates, or written by the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.check import check_recipe
from stillhouse.commands import synthesize_text
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import DataError, RecipeError, RunError
from stillhouse.generation.budget import worst_case
from stillhouse.generation.request import Request
from stillhouse.synthesis.synthesize import Synthesis
from stillhouse.synthesis.synthesize_config import CombineRecipe
from stillhouse.synthesis.write_prompts import combinations, combined, prompt_lines
from tests import tiny
from tests.generation.stub import Reply, Stub

pytestmark = pytest.mark.run

COMBINE = {
    "templates": ["Questions about {topic} of {persona}", "Riddles"],
    "values": {"topic": ["tides", "bread"], "persona": ["a sailor", "a cook"]},
}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath")


def write(folder: Path, url: str, prompts: dict[str, Any], **changes: Any) -> Path:
    section = {
        "teacher": {"api": {"base_url": url, "model": "teacher"}},
        "prompts": prompts,
        "sampling": {"max_tokens": 20},
        **changes,
    }
    raw = tiny.recipe(folder, folder=str(folder / "runs" / "tiny"), synthesize=section)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def prompts_of(result: Synthesis | None) -> list[str]:
    lines = result.out.read_text().splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def asked(stub: Stub) -> list[str]:
    return [payload["messages"][-1]["content"] for payload in stub.payloads]


def teacher(number: int, payload: dict[str, Any]) -> Reply:
    """Writes four prompts per request, the last of which is the same each time."""
    question = payload["messages"][-1]["content"]
    if not question.startswith("Write 4 different prompts"):
        return Reply(text=f"answer to {question}")
    words = [WORDS[(number * 3 + n) % len(WORDS)] for n in range(3)]
    lines = [f"{n}. Tell me about the {word} {number}" for n, word in enumerate(words, 1)]
    return Reply(text="Here they are:\n" + "\n".join([*lines, "- Say the same thing again"]))


# --- combined ----------------------------------------------------------------------------------


def test_each_template_is_filled_with_all_combinations_of_its_values() -> None:
    section = CombineRecipe.model_validate(COMBINE)
    assert combinations(section) == [
        "Questions about tides of a sailor",
        "Questions about tides of a cook",
        "Questions about bread of a sailor",
        "Questions about bread of a cook",
        "Riddles",
    ]
    shuffled = [prompt.messages[0]["content"] for prompt in combined(section, seed=3)]
    assert sorted(shuffled) == sorted(combinations(section))
    assert shuffled == [prompt.messages[0]["content"] for prompt in combined(section, seed=3)]
    assert shuffled != [prompt.messages[0]["content"] for prompt in combined(section, seed=4)]


def test_combinations_are_sent_as_prompts(tmp_path: Path) -> None:
    with Stub(teacher) as stub:
        path = write(tmp_path, stub.url, {"combine": COMBINE, "limit": 4})
        result = synthesize_text(path)
        assert len(stub.payloads) == 4
        first = prompts_of(result)
        assert synthesize_text(path).new == 0
        synthesize_text(path, ["synthesize.prompts.limit=5"])
        assert len(stub.payloads) == 5
    assert set(first) < set(prompts_of(result))
    assert set(prompts_of(result)) == set(combinations(CombineRecipe.model_validate(COMBINE)))


# --- written -----------------------------------------------------------------------------------


def test_prompts_are_written_until_there_are_enough_different_ones(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("".join(f"seed {word} of mine\n" for word in WORDS))
    written = {"count": 11, "per_request": 4, "examples": 2}
    prompts = {"path": "seeds.txt", "combine": COMBINE, "write": written}
    with Stub(teacher) as stub:
        path = write(tmp_path, stub.url, prompts, budget={"max_tokens": 10_000})
        result = synthesize_text(path)
        writing = [question for question in asked(stub) if question.startswith("Write 4")]
        # Three requests would be enough if every fourth prompt were not a repetition.
        assert len(writing) == 4
        assert len(asked(stub)) == 4 + 11
        assert synthesize_text(path).new == 0
        assert len(asked(stub)) == 4 + 11
    found = prompts_of(result)
    assert len(set(found)) == len(found) == 11
    assert found.count("Say the same thing again") == 1
    assert all(not line[0].isdigit() and not line.endswith(":") for line in found)
    assert result.tokens == (4 + 11) * 15, "requests that write prompts count too"
    shown = [[line for line in text.splitlines() if line.startswith("- seed")] for text in writing]
    assert all(len(lines) == 2 for lines in shown)
    assert len({tuple(lines) for lines in shown}) == 4
    kinds = [next(k for k in ("tides", "bread", "Riddles") if k in text) for text in writing]
    assert len(set(kinds)) > 1


def test_writing_prompts_and_answering_them_share_one_budget(tmp_path: Path) -> None:
    """Each reply takes 15 tokens: one reply contains the four prompts, and each is answered."""
    prompts = {"combine": {"templates": ["Riddles"]}, "write": {"count": 4, "per_request": 4}}
    with Stub(teacher) as stub:
        path = write(tmp_path, stub.url, prompts)
        first = synthesize_text(path)
        assert (len(stub.payloads), first.tokens) == (5, 75)
        one = stub.payloads[0]
        limits = {"max_tokens": one["max_tokens"]}
        worst = worst_case(Request(stub.url, "teacher", tuple(one["messages"]), limits), None)
        more = ["synthesize.prompts.write.count=11"]
        again = synthesize_text(path, [*more, f"synthesize.budget.max_tokens={74 + worst.tokens}"])
        assert len(stub.payloads) == 5
        assert again.kept == 4
        synthesize_text(path, [*more, f"synthesize.budget.max_tokens={75 + worst.tokens}"])
        assert len(stub.payloads) > 5


def test_check_counts_the_cost_of_writing_prompts_in_the_budget(tmp_path: Path) -> None:
    prompts = {"combine": COMBINE, "write": {"count": 10, "per_request": 4}}
    with Stub(teacher) as stub:
        path = write(tmp_path, stub.url, prompts)
        check_recipe(path, calls=1)
        assert len(stub.payloads) == 2
        one = stub.payloads[1]
        limits = {"max_tokens": one["max_tokens"]}
        worst = worst_case(Request(stub.url, "teacher", tuple(one["messages"]), limits), None)
        # All requests have the length of this one, give or take a few bytes.
        check_recipe(path, [f"synthesize.budget.max_tokens={20 + worst.tokens}"], calls=1)
        assert len(stub.payloads) == 2
        check_recipe(path, [f"synthesize.budget.max_tokens={40 + worst.tokens}"], calls=1)
        assert len(stub.payloads) == 3


def test_no_more_prompts_are_requested_if_the_teacher_repeats_itself(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        if payload["messages"][-1]["content"].startswith("Write"):
            return Reply(text="The only thing that I can think of")
        return Reply(text="an answer")

    prompts = {"combine": COMBINE, "write": {"count": 20, "per_request": 10}}
    with Stub(script) as stub:
        result = synthesize_text(write(tmp_path, stub.url, prompts))
        assert len(stub.payloads) == 2 * 3 + 1
    assert result.kept == 1


def test_a_teacher_that_writes_no_usable_prompt_is_an_error(tmp_path: Path) -> None:
    prompts = {"combine": COMBINE, "write": {"count": 5}}
    with (
        Stub(lambda n, p: Reply(text="No.")) as stub,
        pytest.raises(DataError, match="wrote no usable prompt") as caught,
    ):
        synthesize_text(write(tmp_path, stub.url, prompts))
    assert str(caught.value.where).endswith("answers.sqlite")


def test_the_error_says_why_no_prompt_was_written(tmp_path: Path) -> None:
    prompts = {"combine": COMBINE, "write": {"count": 5}}
    with Stub(teacher) as stub:
        with pytest.raises(RunError, match="used up before the teacher has written") as budget:
            synthesize_text(write(tmp_path, stub.url, prompts, budget={"max_tokens": 1}))
        assert stub.payloads == []
    assert "raise synthesize.budget" in str(budget.value.fix)
    with (
        Stub(lambda n, p: Reply(text="What is", finish_reason="length")) as stub,
        pytest.raises(DataError, match="wrote no usable prompt") as limit,
    ):
        synthesize_text(write(tmp_path, stub.url, prompts))
    assert "raise synthesize.prompts.write.max_tokens" in str(limit.value.fix)


def test_prompts_are_read_from_the_lines_of_an_answer() -> None:
    text = 'Sure:\n\n1) "What is bread?"\n * Why do tides come\n(3) One\n4. 2 + 2 is what?\nCut o'
    assert list(prompt_lines(text, complete=False)) == [
        "What is bread?",
        "Why do tides come",
        "2 + 2 is what?",
    ]
    assert list(prompt_lines("Cut o", complete=True)) == ["Cut o"]


def test_check_estimates_the_cost_of_prompts_that_are_not_written_yet(tmp_path: Path) -> None:
    prompts = {"combine": COMBINE, "write": {"count": 10, "per_request": 4}}

    def told(calls: int = 0) -> str:
        found = check_recipe(path, calls=calls)
        return next(f.text for f in found if f.topic == "synthesis")

    with Stub(teacher) as stub:
        path = write(tmp_path, stub.url, prompts)
        assert told().startswith("0 of 10 requests are answered; the rest takes at most ")
        assert stub.payloads == []
        assert told(calls=2).startswith("2 of 10 requests are answered")
        assert len(stub.payloads) == 1 + 2
        synthesize_text(path)
        assert told() == "10 of 10 requests are answered"


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({}, "exactly one of path and combine"),
        ({"path": "p.txt", "combine": COMBINE}, "exactly one of path and combine"),
        ({"path": "p.txt", "write": {"count": 3}}, "write needs combine"),
        ({"combine": {"templates": ["about {topic}"]}}, "uses {topic}, which has no values"),
        ({"combine": {"templates": ["about {"]}}, "cannot be parsed"),
        ({"combine": {"templates": ["{n:d}"], "values": {"n": ["1"]}}}, "cannot be parsed"),
        ({"combine": {"templates": ["{n:{m}}"], "values": {"n": ["1"]}}}, "cannot be parsed"),
        ({"combine": {"templates": ["{n.m}"], "values": {"n.m": ["1"]}}}, "cannot be parsed"),
        (
            {
                "combine": {
                    "templates": ["{a} {b} {a}"],
                    "values": {"a": ["x"] * 2000, "b": ["y"] * 2000},
                }
            },
            "4,000,000 combinations",
        ),
    ],
)
def test_invalid_prompt_sections_are_rejected(
    tmp_path: Path, prompts: dict[str, Any], expected: str
) -> None:
    section = {
        "teacher": {"api": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}},
        "prompts": prompts,
    }
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(tiny.recipe(tmp_path, synthesize=section))


def test_chinese_prompts_are_read_from_the_lines_of_an_answer() -> None:
    text = "以下是提示：\n1、怎么开户？\n2. 卡丢了怎么办？\n好"
    assert list(prompt_lines(text, complete=True)) == ["怎么开户？", "卡丢了怎么办？"]
