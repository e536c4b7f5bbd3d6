"""Generations of each model for the same prompts."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.teachers.quiet import quiet


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt: greedily at temperature 0, else sampled from the whole distribution.

    With a chat template the prompt is one user message, else plain text to continue. Prompts are
    processed one by one: in bfloat16, padding beside a longer prompt is enough to turn a good
    answer into a bad one. An answer ends at the end-of-sequence token of the tokenizer or of the
    model, and special tokens are not shown. The same seed gives the same answers; torch's global
    random state is unchanged.
    """
    answers: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    for number, prompt in enumerate(prompts):
        ids_1L = torch.tensor([_prompt_ids(tokenizer, prompt)], device=model.device)
        inputs = {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}
        # transformers warns of sampling settings that greedy search does not use.
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), quiet():
            config = _config(model, tokenizer, max_new_tokens, temperature)
            torch.manual_seed(seed + number)
            output_1L = model.generate(**inputs, generation_config=config)
        new_L = output_1L[0, ids_1L.shape[1] :]
        answers.append(tokenizer.decode(new_L, skip_special_tokens=True))
    return answers


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def _config(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> Any:
    """Sets everything that a checkpoint's own generation_config could change."""
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    sampled = temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        max_length=None,
        do_sample=sampled,
        temperature=temperature if sampled else 1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        use_cache=True,
    )
