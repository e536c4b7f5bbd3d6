"""Configurations of well-known models, with the sizes of their public config.json files."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


def sizes(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int) -> Any:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


TIED = {"head_dim": 128, "tie_word_embeddings": True}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}

LLAMA_70B = LlamaConfig(**sizes(8192, 28672, 80, 64, 8, 128256))  # Llama-3.1-70B
LLAMA_8B = LlamaConfig(**sizes(4096, 14336, 32, 32, 8, 128256))  # Llama-3.1-8B
LLAMA_3B = LlamaConfig(**sizes(3072, 8192, 28, 24, 8, 128256), **TIED)  # Llama-3.2-3B
LLAMA_1B = LlamaConfig(  # Llama-3.2-1B
    **sizes(2048, 8192, 16, 32, 8, 128256), head_dim=64, tie_word_embeddings=True
)
QWEN2_32B = Qwen2Config(**sizes(5120, 27648, 64, 40, 8, 152064))  # Qwen2.5-32B
QWEN2_7B = Qwen2Config(**sizes(3584, 18944, 28, 28, 4, 152064))  # Qwen2.5-7B
QWEN3_8B = Qwen3Config(**sizes(4096, 12288, 36, 32, 8, 151936), head_dim=128)
QWEN3_4B = Qwen3Config(**sizes(2560, 9728, 36, 32, 8, 151936), **TIED)
QWEN3_30B_A3B = Qwen3MoeConfig(**sizes(2048, 6144, 48, 32, 4, 151936), head_dim=128, **EXPERTS)
QWEN3_1_7B = Qwen3Config(**sizes(2048, 6144, 28, 16, 8, 151936), **TIED)
QWEN3_0_6B = Qwen3Config(**sizes(1024, 3072, 28, 16, 8, 151936), **TIED)
SMOLLM2_1_7B = LlamaConfig(**sizes(2048, 8192, 24, 32, 32, 49152), tie_word_embeddings=True)
SMOLLM2_1B = LlamaConfig(  # the same with a smaller FFN
    **sizes(2048, 3072, 24, 32, 32, 49152), tie_word_embeddings=True
)
GEMMA3_27B = Gemma3TextConfig(**sizes(5376, 21504, 62, 32, 16, 262208), **TIED)
GEMMA3_4B = Gemma3TextConfig(
    **sizes(2560, 10240, 34, 8, 4, 262208), head_dim=256, tie_word_embeddings=True
)
