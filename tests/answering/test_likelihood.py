"""A teacher's surprise against the loss that transformers computes."""

from __future__ import annotations

import pytest
import torch

from stillhouse.answering.answering_evaluation import mean_surprise
from tests import tiny


def test_surprise_is_the_loss_on_the_answers_tokens() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    prompts = [({"role": "user", "content": "the cat"},), ({"role": "user", "content": "a"},)]
    answers = ["sees a tree", ""]
    total, tokens = 0.0, 0
    for messages, answer in zip(prompts, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        said = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *said]])
        labels = torch.tensor([[-100] * len(prompt) + said])
        total += model(input_ids=ids, labels=labels).loss.item() * len(said)
        tokens += len(said)
    found = mean_surprise(model, tokenizer, prompts, answers)
    assert found == pytest.approx(total / tokens, rel=1e-5)
