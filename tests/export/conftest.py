"""A tiny Llama with a chat template, saved as the trainer saves it, and windows of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["<unk>", "<eos>", *(f"word{number}" for number in range(62))]
TEMPLATE = "{% for message in messages %}word0 {{ message['content'] }}{% endfor %} word1"


class ToyWindows:
    """Three windows of two documents each; the first four tokens, or all, are not supervised."""

    def __init__(self, *, supervised: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids_RL = torch.randint(2, len(WORDS), (3, 24), generator=generator)
        self.supervised = supervised

    def __len__(self) -> int:
        return len(self.ids_RL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_L = self.ids_RL[index]
        labels_L = ids_L.clone()
        labels_L[: 4 if self.supervised else None] = -100
        positions_L = torch.cat([torch.arange(10), torch.arange(14)])
        return {"input_ids": ids_L, "labels": labels_L, "position_ids": positions_L}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint with a tokenizer, a chat template and a generation config."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return folder
