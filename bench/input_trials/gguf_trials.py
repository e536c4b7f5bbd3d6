"""Trials with GGUF files, written tensor by tensor: valid files, and cases that readers often miss.

The oracle is the model whose tensors were written, computed as the file's keys specify.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from bench.input_trials import files
from bench.input_trials.models import VOCABULARY, judged, model_of, plain_logits
from bench.input_trials.trial import Refusal, Trial

HEADS, KV_HEADS, HEAD, LAYERS = 4, 2, 8, 2
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
Change = Callable[[gguf.GGUFWriter], object]
Quirk = Callable[[random.Random, Path], Trial]


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    if number % 4 == 0:
        return sound(chance, folder)
    return QUIRKS[(number * 3 // 4) % len(QUIRKS)](chance, folder)


def _paired(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Interleave the two halves of each head's rotary dimensions, as GGUF does for Llama."""
    halves = weight.reshape(heads, 2, HEAD // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write(
    path: Path,
    model: Any,
    architecture: str,
    change: Change = lambda writer: None,
    *,
    without: str = "",
    quantized: bool = False,
    padding: str = "<|endoftext|>",
) -> Path:
    """Write a Llama or Qwen model as GGUF. change: adds keys. without: a tensor to leave out."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    special = [padding, "<|start|>", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*special, *_letters(VOCABULARY - 4), "ĀĀ"])
    writer.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["Ā Ā"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    change(writer)
    for name, tensor in tensors(model, architecture).items():
        if name == without:
            continue
        if quantized and tensor.ndim == 2 and tensor.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _letters(count: int) -> list[str]:
    """Return tokens of one or two letters of the byte alphabet."""
    first = [chr(0x100 + n) for n in range(33)]
    return [*first, *(a + b for a in first for b in first if a + b != "ĀĀ")][:count]


def tensors(model: Any, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors under GGUF's names, with rows in llama.cpp's order."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {"token_embd.weight": state["model.embed_tokens.weight"],
             "output_norm.weight": state["model.norm.weight"]}  # fmt: skip
    if not model.config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    for layer in range(LAYERS):
        for name, short in NAMES.items():
            for kind in ("weight", "bias"):
                values = state.get(f"model.layers.{layer}.{name}.{kind}")
                if values is None:
                    continue
                if architecture == "llama" and short in ("attn_q", "attn_k"):
                    values = _paired(values, HEADS if short == "attn_q" else KV_HEADS)
                found[f"blk.{layer}.{short}.{kind}"] = values
    return found


def _model(architecture: str, **changes: Any) -> Any:
    model = model_of(architecture, json.dumps({"tie_word_embeddings": False, **changes}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


def _trial(
    name: str, path: Path, model: Any, refusal: Refusal = "never", excused: tuple[str, ...] = ()
) -> Trial:
    return judged(name, path, plain_logits(model), refusal, excused)


# --- trials ----------------------------------------------------------------------------------


def sound(chance: random.Random, folder: Path) -> Trial:
    architecture = chance.choice(["llama", "qwen2", "qwen3"])
    model = _model(architecture, tie_word_embeddings=chance.random() < 0.5)
    path = folder / chance.choice(["m.gguf", "m.Q8[0].gguf", "M.GGUF"])
    padding = chance.choice(["<|endoftext|>", "<|finetune_right_pad_id|>"])
    return _trial(
        f"gguf: {architecture}, {padding}", write(path, model, architecture, padding=padding), model
    )


def scaled_rope(chance: random.Random, folder: Path) -> Trial:
    """Keys for scaled rotary embeddings, as llama.cpp's converter writes them."""
    kind = chance.choice(["linear", "yarn"])
    architecture = chance.choice(["llama", "qwen2"])
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(64)

    model = _model(architecture, rope_parameters=rope)
    path = write(folder / "m.gguf", model, architecture, change)
    return _trial(f"gguf: {kind} scaling", path, model, "may")


def frequencies(chance: random.Random, folder: Path) -> Trial:
    """Llama 3.1 stores its scaling as a tensor of frequency divisors."""
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = _model("llama", rope_parameters=rope)
    plain = 1.0 / 5e5 ** (torch.arange(0, HEAD, 2).float() / HEAD)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    path = write(folder / "m.gguf", model, "llama", change)
    return _trial("gguf: rope_freqs", path, model, "may")


def biases(chance: random.Random, folder: Path) -> Trial:
    changes: dict[str, Any] = chance.choice([{"attention_bias": True}, {"mlp_bias": True}])
    model = _model("llama", **changes)
    return _trial(f"gguf: llama {changes}", write(folder / "m.gguf", model, "llama"), model, "may")


def unknown_key(chance: random.Random, folder: Path) -> Trial:
    """Keys that change the computation in a way that Llama does not support: rejected or noted."""
    name, add = chance.choice(
        [
            ("llama.logit_scale", 0.5), ("llama.attention.clamp_kqv", 1.0),
            ("llama.attention.max_alibi_bias", 8.0), ("llama.residual_scale", 0.5),
            ("llama.embedding_scale", 2.0), ("llama.final_logit_softcapping", 1.0),
            ("llama.attention.causal", False), ("llama.attention.sliding_window", 4),
            ("llama.rope.scaling.attn_factor", 2.0), ("llama.attn_logit_softcapping", 1.0),
        ]
    )  # fmt: skip

    def change(writer: gguf.GGUFWriter) -> None:
        if isinstance(add, bool):
            writer.add_bool(name, add)
        elif isinstance(add, int):
            writer.add_uint32(name, add)
        else:
            writer.add_float32(name, add)

    path = write(folder / "m.gguf", _model("llama"), "llama", change)
    return judged(f"gguf: {name}", path, None, "must", (name,))


def harmless_key(chance: random.Random, folder: Path) -> Trial:
    """Keys about the file, its authors, or its origin."""
    name = chance.choice(["general.url", "general.author", "quantize.imatrix.file", "general.tags"])
    model = _model("llama")

    def change(writer: gguf.GGUFWriter) -> None:
        if name == "general.tags":
            writer.add_array(name, ["a", "b"])
        else:
            writer.add_string(name, "x")

    return _trial(f"gguf: {name}", write(folder / "m.gguf", model, "llama", change), model)


def surplus_tensor(chance: random.Random, folder: Path) -> Trial:
    name = chance.choice(["blk.0.attn_sinks.weight", "blk.0.attn_q.lora_a", "blk.0.extra.weight",
                          "blk.0.post_attention_norm.weight", "cls.weight"])  # fmt: skip

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(name, np.ones(32, dtype=np.float32))

    path = write(folder / "m.gguf", _model("llama"), "llama", change)
    return judged(f"gguf: additional {name}", path, None, "must", (name, "tensor"))


def missing_tensor(chance: random.Random, folder: Path) -> Trial:
    name = chance.choice(["blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "token_embd.weight",
                          "output_norm.weight", "blk.1.ffn_down.weight"])  # fmt: skip
    path = write(folder / "m.gguf", _model("llama"), "llama", without=name)
    return judged(f"gguf: no {name}", path, None, "must")


def eight_bits(chance: random.Random, folder: Path) -> Trial:
    """Quantized weights must equal the values stored in the file."""
    model = _model("qwen2")
    path = write(folder / "m.gguf", model, "qwen2", quantized=True)
    rounded = _rounded(model)
    return _trial("gguf: q8_0", path, rounded)


def _rounded(model: Any) -> Any:
    import copy

    copied = copy.deepcopy(model)
    kind = gguf.GGMLQuantizationType.Q8_0
    for parameter in copied.parameters():
        if parameter.ndim == 2:
            values = gguf.dequantize(gguf.quantize(parameter.data.numpy(), kind), kind)
            parameter.data = torch.from_numpy(values)
    return copied


def damaged(chance: random.Random, folder: Path) -> Trial:
    path = write(folder / "m.gguf", _model("llama"), "llama")
    data = path.read_bytes()
    name, data = chance.choice(
        [
            ("cut", data[:-500]), ("cut in the keys", data[:300]), ("empty", b""),
            ("Git LFS pointer", files.LFS_POINTER.encode()), ("zeros", bytes(2000)),
            ("version 1", data[:4] + b"\x01\0\0\0" + data[8:]),
            ("version 99", data[:4] + b"\x63\0\0\0" + data[8:]),
            ("a huge count", data[:8] + b"\xff" * 8 + data[16:]),
            ("the older GGML", b"lmgg" + data[4:]),
        ]
    )  # fmt: skip
    path.write_bytes(data)
    return judged(f"gguf: {name}", path, None, "must")


def not_finite(chance: random.Random, folder: Path) -> Trial:
    import copy

    model = copy.deepcopy(_model("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    return judged("gguf: NaN", write(folder / "m.gguf", model, "llama"), None, "must")


def other_architecture(chance: random.Random, folder: Path) -> Trial:
    architecture = chance.choice(["nonsense", "clip", "bert", "whisper", "mamba"])
    path = write(folder / "m.gguf", _model("llama"), architecture)
    return judged(f"gguf: architecture {architecture}", path, None, "must")


def wrong_numbers(chance: random.Random, folder: Path) -> Trial:
    """Keys that do not fit the tensors."""
    name, value = chance.choice(
        [("llama.block_count", 3), ("llama.block_count", 1), ("llama.attention.head_count", 3),
         ("llama.embedding_length", 48), ("llama.attention.head_count_kv", 4)]
    )  # fmt: skip
    path = folder / "m.gguf"
    write(path, _model("llama"), "llama")
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[name].parts[-1][0] = value
    reader.data.flush()
    return judged(f"gguf: {name} {value}", path, None, "must")


def split_file(chance: random.Random, folder: Path) -> Trial:
    """The first of several files that make up a model."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 40)

    name = "m-00001-of-00002.gguf"
    path = write(folder / name, _model("llama"), "llama", change, without="blk.1.attn_k.weight")
    return judged("gguf: the first of two parts", path, None, "must")


QUIRKS: tuple[Quirk, ...] = (
    scaled_rope, frequencies, biases, unknown_key, harmless_key, surplus_tensor, missing_tensor,
    eight_bits, damaged, not_finite, other_architecture, wrong_numbers, split_file, unknown_key,
)  # fmt: skip
