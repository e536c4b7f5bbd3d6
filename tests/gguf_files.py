"""Reads GGUF files of tiny models with the gguf package, transformers, and llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from stillhouse.export.llama_quantizer import has_llama_cpp
from stillhouse.export.replay import LlamaCpp

real = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")

LAYER_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OTHER_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
PAIRED = ("llama", "mistral", "ministral", "ministral3", "smollm3")
"""Model types in which llama.cpp rotates adjacent pairs of queries and keys."""


def letters() -> PreTrainedTokenizerFast:
    """A byte-level BPE with few tokens, for models with a small vocabulary."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<pad>", "<s>", "</s>", *alphabet, "th", "the"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def edited(
    file: Path,
    keys: dict[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None,
) -> Path:
    """A copy of a float32 file with changed keys and tensors; those that are None are left out."""
    keys, tensors = keys or {}, tensors or {}
    reader, copy = gguf.GGUFReader(file), file.with_name(f"edited-{file.name}")
    architecture = keys.get(
        "general.architecture", reader.fields["general.architecture"].contents()
    )
    writer = gguf.GGUFWriter(copy, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in keys:
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if kinds[1:] else None)
    for name, value in keys.items():
        if value is not None and name != "general.architecture":
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, data in {**found, **tensors}.items():
        if data is not None:
            writer.add_tensor(name, np.asarray(data, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def tensors_of(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(file).tensors
    }


def expected_tensors(folder: Path, config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The checkpoint's tensors under GGUF's names: a slow reference of tables and loops."""
    found: dict[str, Any] = {}
    experts: dict[str, dict[int, Any]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        whole, kind = name.rsplit(".", 1)
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", whole)
        if layer is None:
            there = f"{OTHER_PARTS[whole]}.{kind}"
        else:
            part = re.sub(r"experts\.\d+", "experts", layer[2])
            there = f"blk.{layer[1]}.{_part(part, config)}.{kind}"
        values = _values(whole, tensor.float().numpy(), config)
        expert = re.search(r"experts\.(\d+)", whole)
        if expert is not None:
            experts.setdefault(there, {})[int(expert[1])] = values
        elif not (whole == "lm_head" and config.tie_word_embeddings):
            found[there] = values
    stacked = {
        name: np.stack([each[n] for n in range(len(each))]) for name, each in experts.items()
    }
    return found | stacked


def _part(part: str, config: Any) -> str:
    if part == "post_attention_layernorm":
        after = config.model_type in ("gemma2", "gemma3_text")
        return "post_attention_norm" if after else "ffn_norm"
    return LAYER_PARTS[part]


def _values(name: str, values: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    if name.endswith("norm") and config.model_type.startswith("gemma"):
        return values + np.float32(1)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-1])
    if count is None or not (config.model_type in PAIRED or _odd_heads(config)):
        return values
    size = len(values) // count
    order = [
        head * size + pair + half * (size // 2)
        for head in range(count)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    return values[order]


def _odd_heads(config: Any) -> bool:
    """Whether a Qwen 2's heads do not add up to its hidden size; it is then written as a Llama."""
    size = getattr(config, "head_dim", None)
    odd = size is not None and size * config.num_attention_heads != config.hidden_size
    return config.model_type == "qwen2" and odd


def transformers_logits(file: Path, ids: torch.Tensor) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] or [*info["missing_keys"]] == ["lm_head.weight"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def llama_cpp_logits(file: Path, ids_L: torch.Tensor, context: int = 512) -> torch.Tensor:
    """Logits [L, V] of one text, computed by llama.cpp in one call."""
    runtime = LlamaCpp(file, context)
    runtime.llama.reset()
    runtime.llama.eval(ids_L.tolist())
    return torch.from_numpy(runtime.llama.scores[: len(ids_L)].copy())


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of llama.cpp's key-value cache, which is float16."""
    difference = (found - expected.detach()).abs().max()
    assert float(difference) < 0.01 * float(expected.detach().abs().max())
