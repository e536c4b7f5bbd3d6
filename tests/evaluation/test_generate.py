"""Generations: greedy and sampled, batched and alone, with and without a chat template."""

from __future__ import annotations

from logging import Handler
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from stillhouse.evaluation.generate import generate

from .toys import VOCABULARY, toy_model, toy_tokenizer

PROMPTS = ["the cat", "a dog saw the mat and the cat", "run"]


def endless_model(seed: int = 0) -> Any:
    """A toy model that generates no special token, so that answers have their full length."""
    model = toy_model(seed)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    model.lm_head.bias.data[:4] = -1e4
    return model


@torch.no_grad()
def slow_greedy(model: torch.nn.Module, ids: list[int], steps: int) -> list[int]:
    """Greedy tokens without a cache or padding: every step runs the whole prefix again."""
    for _ in range(steps):
        logits: Tensor = model(torch.tensor([ids])).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[-steps:]


def test_greedy_answers_do_not_depend_on_the_cache() -> None:
    model, tokenizer = endless_model(), toy_tokenizer()
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    slow = [
        tokenizer.decode(slow_greedy(model, tokenizer(prompt)["input_ids"], 8))
        for prompt in PROMPTS
    ]
    assert together == slow
    assert len(set(slow)) == len(PROMPTS)


def test_an_answer_does_not_depend_on_other_prompts_in_the_batch() -> None:
    model, tokenizer = endless_model().bfloat16(), toy_tokenizer()
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert together == [generate(model, tokenizer, [p], max_new_tokens=8)[0] for p in PROMPTS]


def test_a_chat_template_wraps_the_prompt_and_stays_out_of_the_answer() -> None:
    model, tokenizer = endless_model(), toy_tokenizer(chat=True)
    answer = generate(model, tokenizer, ["the cat"], max_new_tokens=6)
    wrapped = toy_tokenizer()("<user> the cat <eos> <bot>")["input_ids"]
    assert answer == [toy_tokenizer().decode(slow_greedy(model, wrapped, 6))]


def test_an_answer_ends_at_the_end_token_which_is_not_shown() -> None:
    model, tokenizer = endless_model(), toy_tokenizer()
    model.lm_head.bias.data[tokenizer.eos_token_id] = 1e4
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == ["", "", ""]


def test_sampling_is_seeded_and_does_not_change_the_global_seed() -> None:
    model, tokenizer = endless_model(), toy_tokenizer()

    def sample(seed: int) -> list[str]:
        return generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.5, seed=seed)

    state = torch.random.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sample(1) == first
    assert sample(2) != first


def test_generation_settings_of_the_checkpoint_are_ignored() -> None:
    model, tokenizer = endless_model(), toy_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=50, repetition_penalty=3.0, max_length=3
    )
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generating_logs_no_message(temperature: float) -> None:
    logging.warning_once.cache_clear()  # transformers logs each of these once per process
    messages: list[str] = []
    listener = Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    model, tokenizer = endless_model(), toy_tokenizer()
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=50)
    logging.add_handler(listener)
    try:
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, temperature=temperature)
    finally:
        logging.remove_handler(listener)
    assert messages == []


def test_no_prompts_give_no_answers() -> None:
    assert generate(toy_model(), toy_tokenizer(), [], max_new_tokens=4) == []
