"""Tokenizers of the usual kinds, trained on a few sentences."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests import tiny


def byte_level(size: int, *, special: tuple[str, ...] = (), seed: int = 0, **more: Any) -> Any:
    """Like those of GPT-2, Llama 3, and Qwen. size: the number of tokens without special ones."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=size + 1 + len(special),
        special_tokens=["<|end|>", *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(tiny.text(200, seed).splitlines(keepends=True), trainer)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", additional_special_tokens=list(special), **more
    )


def sentencepiece(size: int, *, prefix_space: bool = False, seed: int = 1) -> Any:
    """Like those of Gemma and (with prefix_space) Llama 2: a BOS token and byte fallback."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = BpeTrainer(vocab_size=size, show_progress=False)
    learned.train_from_iterator(tiny.text(200, seed).splitlines(), trainer)
    state = json.loads(learned.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].get)
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate([*special, *words])}
    core = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(pair) for pair in state["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix_space else replace
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}"
    "\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


def gemma(template: str = GEMMA) -> Any:
    """A tokenizer with a chat template like Gemma's."""
    words = sentencepiece(120)
    words.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    words.chat_template = template
    return words


KINDS = {
    "byte-level": lambda: byte_level(330, seed=1),
    "bytes": tiny.tokenizer,
    "sentencepiece": lambda: sentencepiece(120),
    "sentencepiece with a space in front": lambda: sentencepiece(120, prefix_space=True),
}
