"""Tiny random models and tokenizers for tests of teachers, students, and pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda **more: LlamaConfig(**{**SIZES, **more}),
    "mistral": lambda **more: MistralConfig(**{**SIZES, **more}),
    "qwen2": lambda **more: Qwen2Config(**{**SIZES, **more}),
    "qwen3": lambda **more: Qwen3Config(**{**SIZES, "head_dim": 8, **more}),
    "gemma": lambda **more: GemmaConfig(**{**SIZES, "head_dim": 8, **more}),
    "gemma2": lambda **more: Gemma2Config(
        **{
            **SIZES,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 2.0,
            **more,
        }
    ),
    "gemma3_text": lambda **more: Gemma3TextConfig(
        **{
            **SIZES,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **more,
        }
    ),
    "ministral": lambda **more: MinistralConfig(**{**SIZES, "head_dim": 8, **more}),
    "ministral3": lambda **more: Ministral3Config(**{**SIZES, "head_dim": 8, **more}),
    "qwen3_moe": lambda **more: Qwen3MoeConfig(
        **{
            **SIZES,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            **more,
        }
    ),
    "smollm3": lambda **more: SmolLM3Config(**{**SIZES, "no_rope_layers": [1, 0, 1], **more}),
    "cohere": lambda **more: CohereConfig(**{**SIZES, "logit_scale": 0.25, **more}),
    "granite": lambda **more: GraniteConfig(**{**SIZES, "logits_scaling": 4.0, **more}),
}


def tiny_model(kind: str = "llama", seed: int = 0, **config: Any) -> Any:
    """A float32 model of three layers in eval mode, with weights large enough to matter."""
    torch.manual_seed(seed)
    made = CONFIGS[kind](**config)
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def toy_tokenizer(
    words: int = VOCABULARY - 3, swap: bool = False, template: str | None = None
) -> Any:
    """Whole words w0, w1, ... after three special tokens; `swap` exchanges the ids of w0 and w1."""
    tokens = ["<pad>", "<s>", "</s>"] + [f"w{number}" for number in range(words)]
    if swap:
        tokens[3], tokens[4] = tokens[4], tokens[3]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


def save_model(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    (tiny_model() if model is None else model).save_pretrained(folder)
    (toy_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


class ToyWindows:
    """Random windows; two documents in each, and `padding` unsupervised tokens at its end."""

    def __init__(self, count: int = 24, length: int = 32, padding: int = 0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCABULARY, (count, length), generator=generator)
        half = length // 2
        self.positions = torch.cat([torch.arange(half), torch.arange(length - half)])
        self.labels = self.ids.clone()
        if padding:
            self.labels[:, -padding:] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids[index],
            "labels": self.labels[index],
            "position_ids": self.positions,
        }
