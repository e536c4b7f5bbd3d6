"""If one label is a prefix of another, labels end with the template's end-of-turn token."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.answering.answering_evaluation import mean_surprise
from stillhouse.classify.label_prompts import LabelPrompt, prompt_tokens
from tests import tiny
from tests.chat_toys import GEMMA, PHI, R1, chat, tokenizer

LABELS = {"card": "card", "card_arrival": "card arrival"}


@pytest.mark.parametrize(
    ("template", "eos", "special", "end"),
    [
        (GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        (PHI, "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    ],
)
def test_labels_end_with_the_end_of_turn_token(
    template: str, eos: str, special: tuple[str, ...], end: str
) -> None:
    words = tokenizer(template, eos=eos, special=special)
    made = prompt_tokens(LabelPrompt(LABELS, None, "{text}", "{label}"), words, 64)
    assert [words.decode(ids) for ids in made.labels] == [f"card{end}", f"card arrival{end}"]


def test_labels_without_a_chat_template_end_with_eos() -> None:
    words = tokenizer(GEMMA, eos="<eos>", special=("<start_of_turn>", "<end_of_turn>"))
    made = prompt_tokens(LabelPrompt(LABELS, None, "{text}", "{label}", chat=False), words, 64)
    assert [words.decode(ids) for ids in made.labels] == ["card<eos>", "card arrival<eos>"]


def test_mean_surprise_counts_the_end_of_turn_token() -> None:
    words = tokenizer(GEMMA, eos="<eos>", special=("<start_of_turn>", "<end_of_turn>"))
    model = tiny.llama(vocab_size=len(words))
    text = words.apply_chat_template(chat("a", "yes"), tokenize=False).rstrip("\n")
    ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
    said = len("yes") + 1
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-said:]
    found = mean_surprise(model, words, [chat("a")], ["yes"])
    assert math.isclose(found, -float(log_p.mean()), rel_tol=1e-5)


def test_labels_are_scored_after_the_reasoning_that_a_template_opens() -> None:
    """Otherwise, a label would be scored as the beginning of the reasoning."""
    words = tokenizer(R1)
    made = prompt_tokens(LabelPrompt({"a": "a", "b": "b"}, None, "{text}", "{label}"), words, 64)
    (ids,) = made.of(["2+2?"])
    assert words.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
