"""Text between a model's own reasoning marks is not part of its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from stillhouse.data.reasoning import MARKS
from stillhouse.generation.chat_frame import answer_text
from stillhouse.generation.generator import Continuation, TextGenerator, TokenPrompt
from stillhouse.generation.request import Answer, Request
from stillhouse.synthesis.filters import Row, truncated
from tests.chat_toys import CHATML, HARMONY, HARMONY_SPECIAL, R1, tokenizer

IM = ("<|im_start|>", "<|im_end|>")


class Scripted:
    """Writes the same tokens for every prompt."""

    window = 4096

    def __init__(self, ids: list[int], stop: str) -> None:
        self.ids, self.stop = ids, stop

    def generate(self, prompts: Iterable[TokenPrompt]) -> Iterator[tuple[int, Continuation]]:
        for number, _ in enumerate(prompts):
            yield number, Continuation(self.ids, self.stop)


def answer(
    said: str,
    *,
    template: str = CHATML,
    eos: str = "<|im_end|>",
    special: tuple[str, ...] = IM,
    stop: str = "stop",
) -> Answer:
    words = tokenizer(template, eos=eos, special=special)
    ids = words(said, add_special_tokens=False)["input_ids"]
    request = Request("local", "m", ({"role": "user", "content": "2+2?"},), {"max_tokens": 80})
    ((_, found),) = TextGenerator(Scripted(ids, stop), words).answers([request])
    assert isinstance(found, Answer)
    return found


CHANNELS = "<|channel|>analysis<|message|>Simple sum.<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("said", "more"),
    [
        (
            f"{CHANNELS}<|channel|>final<|message|>Four.<|return|>",
            {"template": HARMONY, "eos": "<|return|>", "special": HARMONY_SPECIAL},
        ),
        ("[THINK]Simple sum.[/THINK]Four.<|im_end|>", {"special": (*IM, "[THINK]", "[/THINK]")}),
        (
            "<think>\nSimple sum.\n</think>\n\nFour.<|im_end|>",
            {"special": (*IM, "<think>", "</think>")},
        ),
        ("<think>\nSimple sum.\n</think>\n\nFour.<|im_end|>", {}),
        ("Simple sum.\n</think>\n\nFour.<|im_end|>", {"template": R1}),
        (
            "<|START_THINKING|>Simple sum.<|END_THINKING|><|START_RESPONSE|>Four.<|END_RESPONSE|>",
            {
                "special": (
                    *IM,
                    *("<|START_THINKING|>", "<|END_THINKING|>"),
                    *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
                )
            },
        ),
        (
            "<|channel>thought\nSimple sum.\n<channel|>Four.<|im_end|>",
            {"special": (*IM, "<|channel>", "<channel|>")},
        ),
        ("<seed:think>Simple sum.</seed:think>Four.<|im_end|>", {}),
        ("◁think▷Simple sum.◁/think▷Four.<|im_end|>", {}),
        (
            "<think>Simple sum.</think><response>Four.</response><|im_end|>",
            {"template": CHATML + "{# <response></response> #}"},
        ),
        (
            "<think>\nSimple sum.\n</think>\n<answer>\nFour.\n</answer><|im_end|>",
            {"template": CHATML + "{# <answer></answer> #}"},
        ),
        (
            "Here is my thought process:\nSimple sum.\nHere is my response:\nFour.<|im_end|>",
            {"template": CHATML + "{# Here is my thought process: Here is my response: #}"},
        ),
    ],
    ids=[
        "gpt-oss",
        "Magistral",
        "<think>, special",
        "<think>, text",
        "opened by the prompt",
        "Command R7B",
        "Gemma 4",
        "Seed-OSS",
        "Kimi-VL",
        "Granite 3.3",
        "Hunyuan",
        "Granite 3.2",
    ],
)
def test_reasoning_and_answer_are_separated(said: str, more: dict[str, str]) -> None:
    found = answer(said, **more)  # type: ignore[arg-type]
    assert (found.text, found.reasoning) == ("Four.", "Simple sum.")
    assert answer_text(found) == "Four."
    assert answer_text(found, keep_reasoning=True) == "<think>\nSimple sum.\n</think>\n\nFour."


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("[THINK]Simple su", {"special": (*IM, "[THINK]", "[/THINK]")}),
        ("<think>\nSimple su", {}),
        ("Simple su", {"template": R1}),
        (
            "<|channel|>analysis<|message|>Simple su",
            {"template": HARMONY, "eos": "<|return|>", "special": HARMONY_SPECIAL},
        ),
    ],
)
def test_truncated_reasoning_has_no_answer(said: str, more: dict[str, str]) -> None:
    found = answer(said, stop="length", **more)  # type: ignore[arg-type]
    assert answer_text(found) == answer_text(found, keep_reasoning=True) == ""
    assert truncated(Row((), answer_text(found), found.finish_reason, "")) is not None


@pytest.mark.parametrize(
    ("text", "reasoning", "rest"),
    [
        ("Four.", "", "Four."),
        ("<think></think>Four.", "", "Four."),
        ("<think>\n\n</think>\n\nFour.", "", "Four."),
        ("<think>\n<think>\na\n</think>\n\nFour.", "<think>\na", "Four."),
        ("<think>a<think>b</think>c</think>Four.", "a<think>bc", "Four."),
        ("a</think>b</think>Four.", "ab", "Four."),
        ("<think>say [THINK]</think>Four.", "say [THINK]", "Four."),
        ("<think>a</think>Two.<think>b</think>Four.", "ab", "Two.Four."),
        ("The mark `<think>` opens, and `</think>` closes.", "", None),
        ("Four. <think> opens it.", "", None),
        ("analysisSimple sum.assistantfinalFour.", "Simple sum.", "Four."),
        ("<answer>Four.</answer>", "", None),
    ],
    ids=[
        "none",
        "empty",
        "empty lines",
        "opened twice",
        "nested",
        "closed twice",
        "other marks inside",
        "between answers",
        "mentioned",
        "opened in the answer",
        "channels without their tokens",
        "tags that a prompt asked for",
    ],
)
def test_reasoning_in_the_text_of_an_unknown_model(
    text: str, reasoning: str, rest: str | None
) -> None:
    said = MARKS.split(text)
    assert (said.reasoning, said.answer) == (reasoning, text if rest is None else rest)
