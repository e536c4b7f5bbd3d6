"""If the generation prompt opens <think>, reasoning is learned from there on. Answers without
reasoning are rejected before a teacher is queried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import stillhouse
from stillhouse.check import check_recipe
from stillhouse.data.documents import Conversation
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.errors import DataError, StillhouseError
from tests import tiny
from tests.chat_toys import (
    CHATML,
    HARMONY_SPECIAL,
    R1,
    chat,
    marked,
    save_model,
    shown,
    tokenizer,
)

IM = ("<|im_start|>", "<|im_end|>")
GIVEN = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
LEARNED = "[[Two and two.\n</think>\n\n4<|im_end|>]]\n"


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nTwo and two.\n</think>\n\n4"},
        {"content": "Two and two.\n</think>\n\n4"},
        {"content": "4", "reasoning_content": "Two and two."},
    ],
    ids=["with both tags", "as the model writes it", "in its own field"],
)
def test_reasoning_is_learned_after_the_tag_that_the_prompt_opens(answer: dict[str, str]) -> None:
    messages = [*chat("2+2?"), {"role": "assistant", **answer}]
    assert shown(messages, tokenizer(R1)) == [GIVEN + LEARNED]


def test_later_turns_do_not_see_the_reasoning_of_earlier_ones() -> None:
    answers = "<think>\nTwo and two.\n</think>\n\n4", "<think>\nOne.</think>2"
    messages = chat("2+2?", answers[0], "1+1?", answers[1])
    first, second = shown(messages, tokenizer(R1))
    assert first == GIVEN + LEARNED
    assert "Two" not in second
    assert second.endswith("<think>\n[[One.</think>2<|im_end|>]]\n")


def test_an_answer_without_reasoning_is_rejected_with_advice() -> None:
    with pytest.raises(DataError) as error:
        shown(chat("2+2?", "4"), tokenizer(R1))
    assert "begin the turn with its reasoning" in str(error.value.fix)
    assert "synthesize.reasoning: keep" in str(error.value.fix)


@pytest.mark.parametrize(
    "template",
    [
        # As in Nemotron Nano: a finished turn opens its reasoning and does not close it.
        R1.replace(
            "<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}",
            "<|im_start|>{{ m['role'] }}\n"
            "{% if m['role'] == 'assistant' %}<think>\n{% endif %}{{ m['content'] }}",
        ),
    ],
)
def test_an_answer_is_never_learned_as_reasoning(template: str) -> None:
    with pytest.raises(DataError, match="own generation prompt"):
        shown(chat("2+2?", "4"), tokenizer(template))
    messages = chat("2+2?", "<think>\nTwo and two.\n</think>\n\n4")
    assert shown(messages, tokenizer(template)) == [GIVEN + LEARNED]


def test_empty_reasoning_in_the_prompt_is_context() -> None:
    """As in Gemma 4, whose template removes it from finished turns."""
    template = R1.replace("<think>\n{% endif %}", "<think>\n</think>{% endif %}")
    assert shown(chat("2+2?", "4"), tokenizer(template)) == [GIVEN + "</think>[[4<|im_end|>]]\n"]


def test_reasoning_is_passed_to_a_template_that_has_its_own_form_for_it() -> None:
    """As in gpt-oss's channels; <think> tags would be learned as a part of the answer."""
    template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
        "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
        "<|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    words = tokenizer(template, eos="<|return|>", special=HARMONY_SPECIAL)
    messages = chat("2+2?", "<think>\nTwo and two.\n</think>\n\n4")
    assert shown(messages, words) == [
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant"
        "[[<|channel|>analysis<|message|>Two and two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>]]"
    ]


def test_reasoning_gets_the_tags_of_the_template() -> None:
    """As in Magistral."""
    words = tokenizer(CHATML + "{# [THINK] [/THINK] #}", special=(*IM, "[THINK]", "[/THINK]"))
    messages = chat("2+2?", "<think>\nTwo and two.\n</think>\n\n4")
    (row,) = tokenize([Conversation(tuple(messages))], words)[0]
    assert marked(row, words).endswith("assistant\n[[[THINK]Two and two.[/THINK]4<|im_end|>]]\n")
    assert words.convert_tokens_to_ids("[THINK]") in row.ids


def test_an_answer_with_two_reasoning_blocks_is_rejected() -> None:
    """As in Kimi K2, whose template puts an empty block before each answer."""
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}",
    )
    assert shown(chat("2+2?", "4"), tokenizer(template))[0].endswith(
        "assistant\n[[<think></think>4<|im_end|>]]\n"
    )
    with pytest.raises(DataError, match="writes a reasoning block before"):
        shown(chat("2+2?", "<think>\nTwo.\n</think>\n\n4"), tokenizer(template))


def test_a_short_answer_is_not_confused_with_a_part_of_the_end_of_turn_token() -> None:
    """As in Nemotron, whose <SPECIAL_12> contains the answer 2."""
    words = tokenizer(R1.replace("<|im_end|>", "<SPECIAL_12>"), eos="<SPECIAL_12>", special=IM)
    assert shown(chat("1+1?", "<think>\nOne.\n</think>\n\n2"), words)[0].endswith(
        "<think>\n[[One.\n</think>\n\n2<SPECIAL_12>]]\n"
    )


def test_a_system_prompt_that_moves_to_the_last_question_stays_in_the_context() -> None:
    """As in Mistral Nemo, whose template omits it from a chat that ends with an answer."""
    template = (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
        "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    words = tokenizer(template, eos="</s>", special=("[INST]", "[/INST]"))
    messages = [{"role": "system", "content": "Be kind."}, *chat("Hi", "Hello.", "Bye", "See you.")]
    assert shown(messages, words) == [
        "[INST]Be kind.\n\nHi[/INST][[Hello.</s>]]",
        "[INST]Hi[/INST]Hello.</s>[INST]Be kind.\n\nBye[/INST][[See you.</s>]]",
    ]


def recipe(folder: Path, template: str = R1, **changes: Any) -> dict[str, Any]:
    save_model(folder / "teacher", tokenizer(template))
    (folder / "text.txt").write_text("")
    (folder / "prompts.txt").write_text("".join(f"Say {n}\n" for n in range(40)))
    section = {
        "teacher": {"local": {}},
        "prompts": {"path": "prompts.txt"},
        "sampling": {"max_tokens": 12},
        "filters": {"truncated": False},
        "out": "out.jsonl",
        **changes,
    }
    data = {"sources": [{"kind": "jsonl", "path": "out.jsonl"}], "heldout_tokens": 64}
    return tiny.recipe(folder, synthesize=section, data=data)


def test_check_and_run_reject_the_template_before_a_teacher_is_queried(tmp_path: Path) -> None:
    raw = recipe(tmp_path)
    errors = [one for one in check_recipe(raw, base=tmp_path) if one.level == "error"]
    assert ["own generation prompt" in one.text for one in errors] == [True]
    assert "synthesize.reasoning: keep" in str(errors[0].fix)
    with pytest.raises(StillhouseError, match="own generation prompt"):
        stillhouse.run(raw, base=tmp_path)
    assert not list(tmp_path.rglob("answers.sqlite"))


def test_check_accepts_the_suggested_fix(tmp_path: Path) -> None:
    found = check_recipe(recipe(tmp_path, reasoning="keep"), base=tmp_path)
    assert not [one for one in found if one.level == "error"]


def test_check_accepts_a_template_that_does_not_open_reasoning(tmp_path: Path) -> None:
    found = check_recipe(recipe(tmp_path, CHATML), base=tmp_path)
    assert not [one for one in found if one.level == "error"]
