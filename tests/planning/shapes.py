"""Configurations of well-known models, with the sizes of their public config.json files."""

from __future__ import annotations

from transformers import LlamaConfig


def llama(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, **more: object
) -> LlamaConfig:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }
    return LlamaConfig(**sizes)


LLAMA_70B = llama(8192, 28672, 80, 64, 8)  # Llama-3.1-70B
LLAMA_8B = llama(4096, 14336, 32, 32, 8)  # Llama-3.1-8B
