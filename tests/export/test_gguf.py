"""A GGUF file has its source's numbers under different names, and a wrong file is rejected."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stillhouse.errors import ModelError
from stillhouse.export import gguf_export
from stillhouse.export.export_formats import GGUF, K_QUANTS
from stillhouse.export.gate import Gate
from stillhouse.export.gguf_export import _less_rounding, announce_gguf, export_gguf
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.export.gguf_model import family
from stillhouse.export.gguf_tokenizer import SPLITS, ByteLevel, tokenizer_in_gguf
from stillhouse.teachers.gguf_families import to_file
from tests import tiny
from tests.export.conftest import ToyWindows

pytestmark = pytest.mark.run

PROMPTS = ["the cat sees 42 trees"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped-query attention, a tied LM head, and a byte-level BPE tokenizer.

    Its weights are small, so that its probabilities are as smooth as a trained model's.
    """
    return save(tmp_path_factory.mktemp("source"))


def save(folder: Path, **changes: Any) -> Path:
    words = tiny.merging_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.05, **changes}
    tiny.llama(vocab_size=len(words), **shape).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def gate(source: Path, **changes: Any) -> Gate:
    return Gate(source, **{"windows": ToyWindows(), "prompts": PROMPTS, "seed": 0, **changes})


def read(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.run
@pytest.mark.fresh_process
def test_transformers_loads_a_q8_0_file_that_agrees_with_its_source(
    source: Path, tmp_path: Path
) -> None:
    """The file is loaded in a fresh process, as a user would."""
    result = export_gguf(gate(source), tmp_path / "out", kind="q8_0", name="toy")
    assert result.format == "gguf-q8_0"
    assert 0 < result.kl < 0.001
    assert result.top1_agreement > 0.9
    assert result.notes == []
    file = tmp_path / "out" / "toy-q8_0.gguf"
    assert result.bytes == file.stat().st_size
    assert result.texts[0].source
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", file.name]
    loaded = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    original = AutoTokenizer.from_pretrained(source)
    assert loaded(PROMPTS)["input_ids"] == original(PROMPTS)["input_ids"]
    assert loaded.chat_template == original.chat_template
    assert loaded.eos_token_id == original.eos_token_id


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"])
def test_every_format_is_within_its_own_kl_limit(source: Path, tmp_path: Path, kind: str) -> None:
    result = export_gguf(gate(source), tmp_path / "out", kind=kind, name="toy")
    assert result.kl <= result.kl_limit == FORMATS[kind].kl_limit
    tensors = read(tmp_path / "out" / f"toy-{kind}.gguf")
    assert tensors["blk.0.ffn_up.weight"].tensor_type == FORMATS[kind].kind
    assert tensors["token_embd.weight"].tensor_type == FORMATS[kind].embeddings
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert "output.weight" not in tensors, "a tied head is stored once"


def test_ternary_rounding_of_a_model_not_trained_for_it_is_rejected(
    tmp_path: Path,
) -> None:
    wide = save(tmp_path / "wide", hidden_size=256, intermediate_size=256, initializer_range=0.2)
    with pytest.raises(ModelError, match="differs from its source") as caught:
        export_gguf(gate(wide), tmp_path / "out", kind="tq1_0", name="toy")
    assert "more bits" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Qwen2ForCausalLM, Qwen2Config(tie_word_embeddings=False)),
        (Qwen3ForCausalLM, Qwen3Config(head_dim=128)),
    ],
)
def test_float32_files_of_qwen_models_equal_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: type, config: Any
) -> None:
    """Replayed in transformers: a random model writes invalid UTF-8, which llama.cpp omits."""
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: False)
    torch.manual_seed(0)
    words = tiny.merging_tokenizer()
    small = {
        "vocab_size": len(words) + 3,  # embedding rows without a token
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 0,
        "bos_token_id": None,
        "layer_types": ["full_attention"] * 2,
    }
    for key, value in small.items():
        setattr(config, key, value)
    model(config).save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    result = export_gguf(gate(tmp_path / "source"), tmp_path / "out", kind="f32", name="toy")
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.texts[0].source == result.texts[0].exported


def test_rows_of_query_and_key_are_in_llama_cpps_order_of_rotary_pairs() -> None:
    """Pair i of a head consists of its rows i and i + half, which become adjacent in the file."""
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1)
    rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    turned = to_file(family(config), "model.layers.0.self_attn.q_proj.weight", rows, config)
    assert turned[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    turned = to_file(family(config), "model.layers.0.self_attn.k_proj.weight", rows, config)
    assert turned[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert to_file(family(config), "model.layers.0.self_attn.v_proj.weight", rows, config) is rows


def test_rows_that_do_not_divide_into_blocks_stay_float16_and_are_announced(
    tmp_path: Path,
) -> None:
    odd = save(tmp_path / "source", intermediate_size=80)
    config, words = AutoConfig.from_pretrained(odd), AutoTokenizer.from_pretrained(odd)
    [(text, fix)] = announce_gguf("q8_0", config, words)
    assert "intermediate_size 80" in text
    assert "64 or 96" in fix
    result = export_gguf(gate(odd), tmp_path / "out", kind="q8_0", name="toy")
    tensors = read(tmp_path / "out" / "toy-q8_0.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert "3 matrices" in result.notes[0]
    assert list(announce_gguf("f16", config, words)) == []


def test_rows_of_the_attention_output_that_do_not_divide_into_blocks_are_announced() -> None:
    """Mistral's heads need not add up to the hidden size."""
    shape = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 3}
    config = MistralConfig(num_key_value_heads=1, sliding_window=None, **shape)
    [(text, fix)] = announce_gguf("q8_0", config, tiny.merging_tokenizer())
    assert "num_attention_heads × head_dim 48 does not divide into blocks of 32" in text
    assert "32 or 64" in fix


def test_packed_blocks_are_written_unchanged(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    blocks = gguf.quantize(np.full((64, 96), 3.0, np.float32), gguf.GGMLQuantizationType.Q4_0)
    packed = {name: (gguf.GGMLQuantizationType.Q4_0, blocks)}
    write_gguf(source, tmp_path / "toy.gguf", FORMATS["f16"], name="toy", packed=packed)
    written = read(tmp_path / "toy.gguf")["blk.1.ffn_down.weight"]
    assert written.tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert np.array_equal(written.data, blocks)


def test_a_file_with_rows_in_the_wrong_order_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", initializer_range=0.2)
    monkeypatch.setattr(
        "stillhouse.export.gguf_file.to_file", lambda model, name, tensor, config: tensor
    )
    with pytest.raises(ModelError, match="differs from its source"):
        export_gguf(gate(source), tmp_path / "out", kind="f16", name="toy")


# --- tokenizers and architectures ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "architecture gpt_neox"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "scaled by longrope"),
        ({"rope_parameters": {"rope_type": "yarn", "attention_factor": 2.0}}, "attention_factor"),
        ({"model_type": "mistral", "sliding_window": 512}, "sliding-window attention"),
        ({"model_type": "qwen3", "attention_bias": True}, "a bias of k_proj in a qwen3"),
    ],
)
def test_architectures_unknown_to_the_writer_are_rejected(
    change: dict[str, Any], message: str
) -> None:
    config = LlamaConfig()
    text = SimpleNamespace(**{**config.to_dict(), **change})
    asked = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(ModelError, match=message):
        list(announce_gguf("f16", asked, tiny.merging_tokenizer()))


def test_a_tokenizer_that_is_not_a_byte_level_bpe_is_rejected(
    trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="tokenizers of type WordLevel") as caught:
        export_gguf(gate(trained), tmp_path / "out", kind="f16", name="toy")
    assert "safetensors" in str(caught.value.fix)


def rules_of(words: Any) -> str:
    held = tokenizer_in_gguf(words)
    assert isinstance(held, ByteLevel)
    return held.rules


@pytest.mark.parametrize("pattern", SPLITS)
def test_the_rules_that_a_tokenizer_splits_text_by_are_recognized(pattern: str) -> None:
    words = tiny.merging_tokenizer()
    assert rules_of(words) == "gpt-2"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    assert rules_of(words) == "smollm"
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    for whole_words, name in enumerate(SPLITS[pattern]):
        words.backend_tokenizer.model.ignore_merges = bool(whole_words)
        if name is not None:
            assert rules_of(words) == name
        else:
            with pytest.raises(ModelError, match="ignore_merges"):
                rules_of(words)
    words.backend_tokenizer.model.ignore_merges = False
    other = pre_tokenizers.Split(Regex("x+"), "isolated")
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([other, plain])
    with pytest.raises(ModelError, match=r"split text by custom .* rules"):
        rules_of(words)


def test_named_chat_templates_are_all_written(source: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(source)
    named = {"default": words.chat_template, "tool_use": "{{ tools }}"}
    words.chat_template = named
    folder = shutil.copytree(source, tmp_path / "source")
    words.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == named
    export_gguf(gate(folder), tmp_path / "out", kind="f16", name="toy")
    fields = gguf.GGUFReader(tmp_path / "out" / "toy-f16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == named["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == named["tool_use"]
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]


def test_transformers_splits_text_by_gpt_4s_rules_without_a_note(
    source: Path, tmp_path: Path
) -> None:
    words = AutoTokenizer.from_pretrained(source)
    split = pre_tokenizers.Split(
        Regex(next(rules for rules, names in SPLITS.items() if "dbrx" in names)), "isolated"
    )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    folder = shutil.copytree(source, tmp_path / "source")
    words.save_pretrained(folder)
    asked = gate(folder, prompts=["They'LL draw 12345 apples,\n\n and  2 dogs"])
    assert export_gguf(asked, tmp_path / "out", kind="f16", name="toy").notes == []


def test_digits_that_transformers_splits_differently_are_noted(
    source: Path, tmp_path: Path
) -> None:
    words = AutoTokenizer.from_pretrained(source)
    digits = pre_tokenizers.Digits(individual_digits=True)
    rules = pre_tokenizers.Sequence([digits, words.backend_tokenizer.pre_tokenizer])
    words.backend_tokenizer.pre_tokenizer = rules
    folder = shutil.copytree(source, tmp_path / "source")
    words.save_pretrained(folder)
    [note] = export_gguf(gate(folder), tmp_path / "out", kind="f16", name="toy").notes
    assert "not by smollm's (several digits" in note
    assert "not compared" in note


def test_the_files_tensors_equal_the_sources(source: Path, tmp_path: Path) -> None:
    write_gguf(source, tmp_path / "toy.gguf", FORMATS["f16"], name="toy")
    weights = load_file(source / "model.safetensors")
    written = read(tmp_path / "toy.gguf")["blk.2.ffn_gate.weight"].data
    expected = weights["model.layers.2.mlp.gate_proj.weight"].half().numpy()
    assert np.array_equal(written, expected)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="toy.gguf", dtype=torch.float32
    ).state_dict()
    for name in weights:
        assert torch.equal(loaded[name], weights[name].half().float()), name


@pytest.mark.parametrize("kind", [*GGUF, *K_QUANTS])
def test_the_advice_about_rounding_names_a_format_that_rounds_less(kind: str) -> None:
    limits, named = GGUF | K_QUANTS, re.search(r"gguf-(\w+)", _less_rounding(kind))
    if kind == "f32":
        assert named is None
    else:
        assert named is not None
        assert limits[named[1]] < limits[kind]
