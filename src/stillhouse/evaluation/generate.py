"""Generate a model's answers to prompts."""

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
    """Generate an answer to each prompt, greedily at temperature 0, otherwise by sampling from the
    full distribution.

    With a chat template, a prompt is a user message; otherwise, it is plain text to continue. An
    answer ends at an end-of-turn token, or at an end-of-sequence token of the tokenizer or of the
    model. Special tokens are removed, except those that mark reasoning. The same seed leads to the
    same answers; torch's global random state does not change.

    Prompts are answered one at a time, because in bfloat16, padding to a longer prompt is enough to
    turn a good answer into a bad one.
    """
    generator = LocalGenerator(model, end_of_answers(tokenizer, model.generation_config), batch=1)
    encoded = [
        TokenPrompt(prompt_ids(tokenizer, prompt), max_new_tokens, temperature, seed=seed + number)
        for number, prompt in enumerate(prompts)
    ]
    # One prompt at a time, so that answers come in order.
    written = [one for prompt in encoded for _, one in generator.generate([prompt])]
    return [decode_with_marks(tokenizer, one.ids) for one in written]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's token ids: as a user message if there is a chat template, else as plain text."""
    if getattr(tokenizer, "chat_template", None):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    return text_ids(tokenizer, prompt, start=True)
