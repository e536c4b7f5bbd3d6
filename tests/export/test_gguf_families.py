"""A GGUF file computes what its checkpoint computes, or is rejected or announced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stillhouse.errors import ModelError
from stillhouse.export import gguf_export
from stillhouse.export.gate import Gate
from stillhouse.export.gguf_config import misread_by_transformers
from stillhouse.export.gguf_export import announce_gguf, export_gguf
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.export.gguf_model import family, rope_factors
from tests import tiny
from tests.export.conftest import ToyWindows
from tests.gguf_files import (
    assert_alike,
    expected_tensors,
    letters,
    llama_cpp_logits,
    real,
    tensors_of,
    transformers_logits,
)
from tests.gguf_models import LLAMA_3, YARN
from tests.teachers.toys import CONFIGS, VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(9))
GEMMA_3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "a wide head": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 768}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 256, "query_pre_attn_scalar": 256, "layer_types": ["sliding_attention"] * 3},
    ),
}
"""Models that transformers' GGUF loader reads correctly: type, and changes to its configuration."""
LLAMA_CPP: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "biases"),
    "llama 3": ("llama", {"rope_parameters": LLAMA_3}, "the scaling of rotary embeddings"),
    "yarn": ("llama", {"rope_parameters": YARN}, "the scaling of rotary embeddings"),
    "qwen2 of another head size": ("qwen2", {"head_dim": 16}, "biases"),
    "qwen3 of another head size": ("qwen3", {"head_dim": 16}, "the head size"),
    "qwen3_moe of narrow experts": ("qwen3_moe", {}, "moe_intermediate_size"),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
        "the architecture smollm3",
    ),
    "ministral3": (
        "ministral3",
        {"rope_parameters": {**YARN, "mscale_all_dim": 1.0, "mscale": 1.0}},
        "the architecture mistral3",
    ),
    "ministral3 of long texts": (
        "ministral3",
        {
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 8,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.5,
            }
        },
        "the architecture mistral3",
    ),
    "gemma": ("gemma", {}, "the architecture gemma"),
    "gemma2 of small heads": ("gemma2", {}, "query_pre_attn_scalar"),
    "gemma2 cut in depth": (
        "gemma2",
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        "which layers have a window",
    ),
    "gemma3 with a pattern of its own": ("gemma3_text", {}, "which layers have a window"),
    "gemma3 with a long context": (
        "gemma3_text",
        {"rope_parameters": GEMMA_3_ROPES},
        "the base of rotary embeddings",
    ),
}
"""Models that only llama.cpp reads correctly, and the first value that transformers misreads."""


def write(folder: Path, kind: str, changes: dict[str, Any]) -> tuple[Path, Any]:
    """The GGUF file of a tiny model whose norms and biases differ from their initial values."""
    if kind == "ministral3":
        beta = {"llama_4_scaling_beta": 0.0}
        changes = {**changes, "rope_parameters": beta | changes["rope_parameters"]}
    model = tiny_model(kind, **changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    write_gguf(folder, folder / "toy.gguf", FORMATS["f32"], name="toy")
    return folder / "toy.gguf", AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", READ)
def test_transformers_computes_the_checkpoints_logits_from_the_file(
    tmp_path: Path, name: str
) -> None:
    kind, changes = READ[name]
    file, model = write(tmp_path, kind, changes)
    assert misread_by_transformers(model.config) is None
    found = transformers_logits(file, IDS)
    assert_close(found, model(input_ids=IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_values_that_transformers_misreads_are_detected_and_the_tensors_are_correct(
    tmp_path: Path, name: str
) -> None:
    kind, changes, misread = LLAMA_CPP[name]
    file, model = write(tmp_path, kind, changes)
    assert misread_by_transformers(model.config) == misread
    expected, written = expected_tensors(tmp_path, model.config), tensors_of(file)
    assert written.keys() - {"rope_freqs.weight"} == expected.keys()
    for tensor, values in expected.items():
        assert np.array_equal(written[tensor], values), tensor


@real
@pytest.mark.parametrize("name", [*READ, *LLAMA_CPP])
def test_llama_cpp_computes_the_checkpoints_logits_from_the_file(tmp_path: Path, name: str) -> None:
    kind, changes = READ[name] if name in READ else LLAMA_CPP[name][:2]
    file, model = write(tmp_path, kind, changes)
    expected = model(input_ids=IDS, use_cache=False).logits[0]
    assert_alike(llama_cpp_logits(file, IDS[0]), expected.detach())


def test_sizes_that_transformers_rejects_are_detected() -> None:
    """A Mistral file is read as a Llama, whose hidden size must be a multiple of its heads."""
    config = CONFIGS["mistral"](head_dim=8, num_attention_heads=3, num_key_value_heads=1)
    assert misread_by_transformers(config) == "sizes that it does not allow"


def test_rotary_frequencies_of_llama_3_are_divided_as_transformers_does() -> None:
    config = LlamaConfig(head_dim=64, max_position_embeddings=1024, rope_parameters=LLAMA_3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = rope_factors(config)
    assert factors is not None
    assert factors.min() == 1
    assert factors.max() == 8
    assert_close(plain / torch.from_numpy(factors), scaled)
    assert rope_factors(LlamaConfig()) is None


def test_sliding_windows_and_softcaps_are_written(tmp_path: Path) -> None:
    file, _ = write(tmp_path, *LLAMA_CPP["gemma2 cut in depth"][:2])
    fields = gguf.GGUFReader(file).fields
    assert fields["gemma2.attention.sliding_window"].contents() == 8
    assert fields["gemma2.attention.sliding_window_pattern"].contents() == [False, False, True]
    assert fields["gemma2.final_logit_softcapping"].contents() == 2.0
    assert fields["gemma2.attn_logit_softcapping"].contents() == 50.0


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("smollm3", {}, "other layers than every 4th"),
        ("smollm3", {"attention_bias": True, "no_rope_layers": [1, 1, 1]}, "a bias of o_proj"),
        ("qwen3_moe", {"norm_topk_prob": False}, "do not add up to 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layers without experts"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "llama.cpp scales it by 8"),
        ("gemma2", {"attn_logit_softcapping": None}, "without soft caps"),
        ("ministral3", {"rope_parameters": {**YARN, "mscale": 2.0}}, "mscale 2.0"),
    ],
)
def test_models_that_llama_cpp_computes_differently_are_rejected(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        family(CONFIGS[kind](**changes))


# --- files that only llama.cpp reads --------------------------------------------------------------


def test_check_rejects_a_file_that_transformers_misreads_without_llama_cpp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, words = CONFIGS["qwen3"](head_dim=16), tiny.merging_tokenizer()
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: False)
    with pytest.raises(ModelError, match="misread the head size") as caught:
        list(announce_gguf("f16", config, words))
    assert "llama-cpp" in str(caught.value.fix)
    assert list(announce_gguf("f16", CONFIGS["qwen3"](head_dim=128), words)) == []
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: True)
    [(text, _)] = announce_gguf("f16", config, words)
    assert "the head size" in text


def test_a_cut_in_depth_is_rejected_or_announced_before_its_layers_are_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which layers are kept is not known yet, so any of them may not match llama.cpp's pattern."""
    words = tiny.merging_tokenizer()
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: True)
    config = CONFIGS["smollm3"](no_rope_layers=[1, 1, 1])
    assert len(list(announce_gguf("f16", config, words, layers_before=3))) == 1
    with pytest.raises(ModelError, match="with fewer layers"):
        list(announce_gguf("f16", config, words, layers_before=4))
    whole = CONFIGS["gemma2"](head_dim=256, query_pre_attn_scalar=256, final_logit_softcapping=30.0)
    assert list(announce_gguf("f16", whole, words, layers_before=3)) == []
    [(text, _)] = announce_gguf("f16", whole, words, layers_before=4)
    assert "which layers have a window" in text


def test_rows_of_experts_that_do_not_divide_into_blocks_are_announced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: True)
    config = CONFIGS["qwen3_moe"](moe_intermediate_size=40, intermediate_size=33)
    found = [text for text, _ in announce_gguf("q8_0", config, tiny.merging_tokenizer())]
    assert "moe_intermediate_size 40" in found[-1]
    assert len(found) == 2


@real
def test_only_llama_cpp_replays_files_that_transformers_misreads(tmp_path: Path) -> None:
    words = tiny.merging_tokenizer()
    changes: dict[str, Any] = {"vocab_size": len(words), "head_dim": 16, "initializer_range": 0.05}
    tiny_model("qwen3", **changes).save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    gate = Gate(tmp_path / "source", ToyWindows(), ["the cat sees 42 trees"], seed=0)
    result = export_gguf(gate, tmp_path / "out", kind="q8_0", name="toy")
    assert result.llama_cpp is not None
    assert result.llama_cpp.kl == result.kl < 0.02
    assert "the head size" in result.notes[0]
