"""What each model writes to the same prompts."""

from __future__ import annotations

from typing import Any

from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator, end_tokens


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
    to continue. Prompts are answered one by one: in bfloat16, padding beside a longer prompt is
    enough to turn a good answer into a bad one. An answer ends at the end-of-sequence token of the
    tokenizer or of the model, and special tokens are not shown. The same seed gives the same
    answers; torch's global random state is left as it was.
    """
    generator = LocalGenerator(model, end_tokens(model, tokenizer), batch=1)
    encoded = [
        TokenPrompt(prompt_ids(tokenizer, prompt), max_new_tokens, temperature, seed=seed + number)
        for number, prompt in enumerate(prompts)
    ]
    # One at a time, so that they come in their order.
    written = [one for prompt in encoded for _, one in generator.generate([prompt])]
    return [tokenizer.decode(one.ids, skip_special_tokens=True) for one in written]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """What a model reads of a prompt: a user's turn where it has a chat template, else text."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])
    return list(tokenizer(prompt)["input_ids"])
