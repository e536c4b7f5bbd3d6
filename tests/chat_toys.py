"""Chat templates like those of real models, and a byte tokenizer with their special tokens."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from stillhouse.data.documents import Conversation
from stillhouse.data.tokenize_rows import tokenize
from tests import tiny

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
# A turn ends where the next one begins.
GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Plain-text headings without any special token.
ALPACA = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# EOS follows the last turn unless a generation prompt is requested.
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# The last answer ends with a different token than earlier ones.
HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# The generation prompt opens the reasoning; finished turns omit it.
R1 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GLM_SPECIAL = ("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>")
HARMONY_SPECIAL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")


def tokenizer(
    template: str | None = CHATML,
    *,
    eos: str = "<|im_end|>",
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
) -> Any:
    """A tokenizer with one token per byte and one merge. EOS is token 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = list(dict.fromkeys([eos, *special, *alphabet, "th"]))
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=[one for one in special if one != eos],
        chat_template=template,
    )


def save_model(folder: Path, words: Any, *, ends: list[int] | None = None, **changes: Any) -> Path:
    """Save a tiny Llama with this tokenizer. `ends`: eos_token_id of its generation config."""
    model = tiny.llama(vocab_size=len(words), **changes)
    if ends is not None:
        model.generation_config = GenerationConfig(eos_token_id=ends)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def chat(*turns: str) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def shown(messages: list[dict[str, Any]], words: Any, **more: Any) -> list[str]:
    """The rows of a chat as text, with [[ and ]] around what is learned."""
    document = Conversation(tuple(messages), **more)
    return [marked(row, words) for row in tokenize([document], words)[0]]


def marked(row: Any, words: Any) -> str:
    pairs = zip(row.supervised.tolist(), row.ids.tolist(), strict=True)
    parts = [
        (supervised, words.decode([token for _, token in run]))
        for supervised, run in groupby(pairs, key=lambda pair: pair[0])
    ]
    return "".join(f"[[{text}]]" if supervised else text for supervised, text in parts)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
