"""The token that ends an assistant's turn, with templates like those of many models."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.data.turn_end import turn_end
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.vllm_engine import VllmGenerator
from tests.chat_toys import (
    CHATML,
    GEMMA,
    HARMONY,
    HARMONY_SPECIAL,
    PHI,
    chat,
    shown,
    tokenizer,
)

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls[0].name }}<|eom_id|>"
    "{% else %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The original template of Llama 3: it always adds the generation prompt.
LLAMA_3_0 = LLAMA_3.partition("{% if add_generation_prompt %}")[0] + (
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
OLMO_2 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or m['role'] == 'user' %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}"
    "<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
COMMAND_R7B = (
    "{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ m['role'] }}|"
    "{% if m['role'] == 'assistant' %}<|START_RESPONSE|>{{ m['content'] }}<|END_RESPONSE|>"
    "{% else %}{{ m['content'] }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>assistant|{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} ASSISTANT:"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# The last turn has an end only if it is a tool call.
HUNYUAN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{{ eos_token }}\n{% endif %}"
    "{% if m['role'] == 'assistant' and not m.tool_calls and not loop.last %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")


@pytest.mark.parametrize(
    ("template", "eos", "special", "learned"),
    [
        (LLAMA_2, "</s>", ("<s>",), "[[ Hello. </s>]]"),
        (LLAMA_3, "<|end_of_text|>", HEADERS, "[[Hello.<|eot_id|>]]"),
        (LLAMA_3_0, "<|end_of_text|>", HEADERS, "[[Hello.<|eot_id|>]]"),
        (MISTRAL, "</s>", ("[INST]", "[/INST]"), "[[ Hello.</s>]]"),
        (OLMO_2, "<|endoftext|>", (), "[[Hello.<|endoftext|>]]"),
        (
            GRANITE,
            "<|end_of_text|>",
            ("<|start_of_role|>", "<|end_of_role|>"),
            "[[Hello.<|end_of_text|>]]",
        ),
        (
            COMMAND_R7B,
            "<|END_OF_TURN_TOKEN|>",
            ("<|START_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
            "[[<|START_RESPONSE|>Hello.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>]]",
        ),
        (VICUNA, "</s>", (), "[[ Hello.</s>]]"),
        (GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"), "[[Hello.<end_of_turn>]]"),
        (PHI, "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), "[[Hello.<|end|>]]"),
        (
            HARMONY,
            "<|return|>",
            HARMONY_SPECIAL,
            "[[<|channel|>final<|message|>Hello.<|return|>]]",
        ),
    ],
    ids=[
        "Llama 2",
        "Llama 3.1",
        "Llama 3",
        "Mistral",
        "OLMo 2",
        "Granite",
        "Command R7B",
        "Vicuna",
        "Gemma",
        "Phi 3",
        "gpt-oss",
    ],
)
def test_a_turn_is_supervised_up_to_and_including_its_end(
    template: str, eos: str, special: tuple[str, ...], learned: str
) -> None:
    words = tokenizer(template, eos=eos, special=special)
    end = turn_end(words)
    assert end is not None
    assert end.written
    assert learned.endswith(f"{end.text}]]")
    rows = shown(chat("Hi", "Hello.", "Bye", "Hello."), words)
    assert sum(row.count(learned) for row in rows) == 2
    assert sum(row.count("[[") for row in rows) == 2


def test_turns_share_a_row_even_if_the_template_writes_more_after_the_last_one() -> None:
    words = tokenizer(PHI, eos="<|endoftext|>", special=("<|user|>", "<|assistant|>", "<|end|>"))
    assert shown(chat("Hi", "Hello.", "Bye", "See you."), words) == [
        "<|user|>\nHi<|end|>\n<|assistant|>\n[[Hello.<|end|>]]\n<|user|>\nBye<|end|>\n"
        "<|assistant|>\n[[See you.<|end|>]]\n<|endoftext|>"
    ]


def test_an_end_that_the_template_leaves_out_is_added_once() -> None:
    words = tokenizer(HUNYUAN, eos="<eos>", special=("<|user|>", "<|assistant|>", "<|tool|>"))
    call = {"type": "function", "function": {"name": "rain", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "It is dry."},
    ]
    assert shown(messages, words) == [
        '<|user|>Rain?<|assistant|>[[{"name": "rain", "arguments": {}}<eos>]]\n<|tool|>no'
        "<|assistant|>[[It is dry.<eos>]]"
    ]


def test_a_template_that_requires_a_system_prompt_has_an_end() -> None:
    end = turn_end(tokenizer(STRICT, eos="<|endoftext|>"))
    assert end is not None
    assert (end.text, end.written) == ("<|im_end|>", True)


def test_without_a_template_the_end_is_eos() -> None:
    end = turn_end(tokenizer(None, eos="<|endoftext|>"))
    assert end is not None
    assert (end.text, end.written) == ("<|endoftext|>", False)


def test_the_end_changes_when_the_template_is_replaced() -> None:
    words = tokenizer(CHATML, eos="<eos>", special=("<|im_end|>", "<end_of_turn>"))
    first = turn_end(words)
    words.chat_template = GEMMA
    second = turn_end(words)
    assert first is not None
    assert second is not None
    assert (first.text, second.text) == ("<|im_end|>", "<end_of_turn>")


@pytest.mark.parametrize(("stops", "told"), [((), None), ((2,), [2])])
def test_vllm_is_told_which_tokens_end_a_turn(
    stops: tuple[int, ...], told: list[int] | None
) -> None:
    asked = []

    class Engine:
        window = 64

        def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            asked.extend(rows)
            return [{"text": "", "ids": [2], "stop": "stop", "logprobs": None} for _ in rows]

        def close(self) -> None: ...

    list(VllmGenerator(Engine(), 4, stops).generate([TokenPrompt([1], 8)]))
    assert asked[0]["sampling"].get("stop_token_ids") == told
