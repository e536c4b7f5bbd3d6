"""The mean surprise of answers, compared with the loss that transformers computes."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

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
        target = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *target]])
        labels = torch.tensor([[-100] * len(prompt) + target])
        total += model(input_ids=ids, labels=labels).loss.item() * len(target)
        tokens += len(target)
    found = mean_surprise(model, tokenizer, prompts, answers)
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_tokens_beyond_the_models_positions_do_not_count() -> None:
    tokenizer = tiny.tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    prompts = [({"role": "user", "content": text},) for text in ("x" * 9, "x" * 50)]
    found = mean_surprise(model, tokenizer, prompts, ["y" * 50, "y"], window=32)
    prompt = tokenizer.apply_chat_template(
        [dict(m) for m in prompts[0]], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    ids = torch.tensor([[*prompt, *tokenizer("y" * 50)["input_ids"]][:32]])
    labels = torch.tensor([[-100] * len(prompt) + ids[0, len(prompt) :].tolist()])
    assert found == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
