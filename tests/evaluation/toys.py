"""Tiny models, a toy tokenizer, and held-out windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run")
SPECIAL = ("<pad>", "<eos>", "<user>", "<bot>")
VOCABULARY = len(SPECIAL) + len(WORDS)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)


def toy_model(seed: int = 0, *, vocabulary: int = VOCABULARY, layers: int = 2) -> Any:
    """A random Llama with logits far from uniform, so that no metric is near a trivial value."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def toy_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    table = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<user>", "<bot>"],
    )
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def save_toy(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def window(documents: list[list[int]], masked: int = 0) -> dict[str, Tensor]:
    """A window of packed documents. Their first tokens and the first `masked` have no label."""
    ids = [token for document in documents for token in document]
    positions = [position for document in documents for position in range(len(document))]
    labels = [
        -100 if position == 0 or index < masked else token
        for index, (token, position) in enumerate(zip(ids, positions, strict=True))
    ]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
    }


def random_documents(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


def mixed_windows() -> list[dict[str, Tensor]]:
    """Packed and single documents, unequal lengths, masks, and one window with no label."""
    return [
        window(random_documents(1, 7, 9)),
        window(random_documents(2, 16), masked=5),
        window(random_documents(3, 16), masked=16),
        window(random_documents(4, 5)),
        window(random_documents(5, 2, 3, 4), masked=3),
        window(random_documents(6, 9)),
    ]
