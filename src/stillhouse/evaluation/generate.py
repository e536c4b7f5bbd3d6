"""What each model writes to the same prompts."""

from __future__ import annotations

from typing import Any

from stillhouse.data.chat_prompt import chat_ids, text_ids
from stillhouse.data.reasoning import decode_with_marks
from stillhouse.data.turn_end import end_of_answers
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers each prompt: greedily at temperature 0, else sampled from the full distribution.

    A tokenizer with a chat template gets the prompt as one user message; another gets plain text
    to continue. Prompts are answered one by one: in bfloat16, padding beside a longer prompt is
    enough to turn a good answer into a bad one. An answer ends at the end of a turn, or at an
    end-of-sequence token of the tokenizer or of the model. Special tokens are not shown, except
    those that mark reasoning. The same seed gives the same answers; torch's global random state is
    left as it was.
    """
    generator = LocalGenerator(model, end_of_answers(tokenizer, model.generation_config), batch=1)
    encoded = [
        TokenPrompt(prompt_ids(tokenizer, prompt), max_new_tokens, temperature, seed=seed + number)
        for number, prompt in enumerate(prompts)
    ]
    # One at a time, so that they come in their order.
    written = [one for prompt in encoded for _, one in generator.generate([prompt])]
    return [decode_with_marks(tokenizer, one.ids) for one in written]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """What a model reads of a prompt: a user's turn where it has a chat template, else text."""
    if getattr(tokenizer, "chat_template", None):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    return text_ids(tokenizer, prompt, start=True)
