"""What each model writes to the same prompts."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.teachers.quiet import quiet

BATCH = 8


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers each prompt: greedily at temperature 0, else sampled from the whole distribution.

    A tokenizer with a chat template gets the prompt as one user message; another gets plain text
    to continue. Prompts are padded on the left and answered together. An answer ends at the
    end-of-sequence token of the tokenizer or of the model, and special tokens are not shown.
    The same seed gives the same answers; torch's global random state is left as it was.
    """
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        inputs = _left_padded([_prompt_ids(tokenizer, text) for text in prompts[start:][:BATCH]])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        devices = [model.device] if model.device.type == "cuda" else []
        # transformers remarks on sampling settings that greedy search does not use.
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), quiet():
            config = _config(model, tokenizer, max_new_tokens, temperature)
            torch.manual_seed(seed + start)
            output_RL = model.generate(**inputs, generation_config=config)
        new_RL = output_RL[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_RL, skip_special_tokens=True)
    return answers


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def _left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Token 0 fills the gap: masked, so which one does not matter."""
    length = max(len(row) for row in rows)
    gaps = [length - len(row) for row in rows]
    ids = [[0] * gap + row for gap, row in zip(gaps, rows, strict=True)]
    mask = [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _config(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> Any:
    """Every setting that a checkpoint's own generation_config could change is set."""
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
