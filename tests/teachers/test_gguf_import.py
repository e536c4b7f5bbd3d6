"""Every key and tensor of a GGUF file is used in the converted model, or the file is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from stillhouse.checksums import write_sums
from stillhouse.errors import ModelError
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model
from tests import tiny
from tests.export import test_gguf_sentencepiece as sentencepiece
from tests.gguf_files import edited
from tests.gguf_models import LONG_SIZES, MODELS, save

pytestmark = pytest.mark.run

HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
IDS = torch.randint(4, 256, (1, 48), generator=torch.Generator().manual_seed(9))


def gguf(folder: Path, name: str, **more: Any) -> tuple[Path, Any]:
    """A GGUF file of one of `MODELS`, and the model."""
    model = save(folder / "model", name, **more)
    write_gguf(folder / "model", folder / "model.gguf", FORMATS["f32"], name="tiny")
    return folder / "model.gguf", model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("llama"), "llama")[0]


def converted(file: Path) -> Path:
    return resolve_model(str(file), base=file.parent, cache=file.parent).path


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = load_model(folder, dtype=torch.float32)(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_has_the_original_logits(tmp_path: Path, name: str) -> None:
    file, model = gguf(tmp_path, name)
    assert_close(logits(converted(file)), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_damaged_conversion_is_repeated(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    made = resolve_model(str(llama), base=tmp_path, cache=cache).path
    weights = made / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert resolve_model(str(llama), base=tmp_path, cache=cache).path == made
    assert weights.read_bytes() == whole
    assert "is damaged (model.safetensors)" in capsys.readouterr().err


def test_a_damaged_gguf_export_is_rejected_as_a_teacher(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(llama.read_bytes())
    write_sums(tmp_path)
    resolve_model(str(file), base=tmp_path, cache=tmp_path / "cache")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf does not match SHA256SUMS"):
        resolve_model(str(file), base=tmp_path, cache=tmp_path / "cache")


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("attention.scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("attention.sliding_window", 8),
        ("attention.temperature_scale", 0.1),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 8.0),
        ("residual_scale", 0.5),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("expert_weights_scale", 2.5),
        ("use_parallel_residual", True),
        ("pooling_type", 1),
        ("rope.freq_base_swa", 10000.0),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.dimension_sections", 4),
        ("nextn_predict_layers", 1),
        ("something.new", 3),
    ],
)
def test_a_key_that_cannot_be_converted_is_rejected_by_name(
    llama: Path, key: str, value: Any
) -> None:
    with pytest.raises(ModelError, match=rf"llama\.{key} = {value}"):
        converted(edited(llama, {f"llama.{key}": value}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.attention.value_length": 4}, "value_length"),
        ({"llama.rope.dimension_count": 4}, "partial rotary embeddings"),
        ({"llama.rope.scaling.type": "su"}, "rope.scaling.type = su"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope without rope_factors_long.weight"),
        ({"llama.feed_forward_length": [64, 64, 32]}, "layers have different sizes"),
        ({"llama.attention.head_count": None}, "the key llama.attention.head_count is missing"),
        ({"llama.block_count": 2}, "not part of the model: blk.2."),
        ({"llama.block_count": 4}, r"9 of \d+ tensors are missing: model\.layers\.3\."),
        ({f"llama.{key}": 16 for key in HEAD_SIZES}, r"has shape \[32, 32\], not \[64, 32\]"),
        ({"general.architecture": "falcon"}, "the architecture falcon"),
        ({"general.type": "adapter"}, "not contain a model: general.type = adapter"),
        ({"split.count": 2}, "one of several parts"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, r"unknown rules \(kimi-k2\)"),
    ],
)
def test_keys_that_contradict_the_tensors_or_are_unsupported_are_rejected(
    llama: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        converted(edited(llama, keys))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count", "many"),
        ("attention.head_count_kv", 3),
        ("embedding_length", -32),
        ("block_count", 10**9),
        ("block_count", 0),
        ("rope.freq_base", "high"),
        ("rope.freq_base", 0.0),
        ("rope.scaling.factor", -1.0),
        ("attention.layer_norm_rms_epsilon", float("nan")),
    ],
)
def test_invalid_values_of_keys_are_one_error(llama: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match="cannot convert this GGUF file"):
        converted(edited(llama, {f"llama.{key}": value}))


def test_keys_without_effect_are_accepted(llama: Path) -> None:
    keys = {
        "llama.attention.causal": True,
        "llama.expert_count": 0,
        "llama.rope.scaling.finetuned": True,
        "llama.rope.scaling.factor": 1.0,
        "mradermacher.quantized_by": "somebody",
    }
    assert torch.equal(logits(converted(edited(llama, keys))), logits(converted(llama)))


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_scaling_factor_without_a_type_is_linear(llama: Path, key: str) -> None:
    """Converters of 2023 wrote such files, and llama.cpp reads them as linear."""
    rope = config(converted(edited(llama, {f"llama.{key}": 4.0})))["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_the_attention_factor_of_yarn_is_multiplied_by_the_default(tmp_path: Path) -> None:
    file, _ = gguf(tmp_path, "llama, yarn")
    folder = converted(edited(file, {"llama.rope.scaling.attn_factor": 0.5}))
    found = config(folder)["rope_parameters"]["attention_factor"]
    assert found == pytest.approx(0.5 * (0.1 * np.log(4.0) + 1))


def test_a_granite_model_without_rotary_embeddings_is_rejected(tmp_path: Path) -> None:
    file, _ = gguf(tmp_path, "granite")
    with pytest.raises(ModelError, match="without rotary embeddings"):
        converted(edited(file, {"granite.rope.scaling.finetuned": False}))


def test_the_sliding_window_of_gemma_3_is_read(tmp_path: Path) -> None:
    file, _ = gguf(tmp_path, "gemma3, two bases")
    folder = converted(edited(file, {"gemma3.attention.sliding_window": 4}))
    assert config(folder)["sliding_window"] == 4
    with pytest.raises(ModelError, match=r"the key gemma3\.attention\.sliding_window is missing"):
        converted(edited(file, {"gemma3.attention.sliding_window": None}))


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q_norm.weight", 8),
        ("blk.1.attn_sinks.weight", 4),
        ("blk.0.post_attention_norm.weight", 32),
        ("output.bias", 264),
        ("v.patch_embd.weight", 8),
        ("cls.weight", 32),
    ],
)
def test_a_surplus_tensor_is_rejected_by_name(llama: Path, name: str, shape: int) -> None:
    with pytest.raises(ModelError, match=f"not part of the model: {name}"):
        converted(edited(llama, tensors={name: np.ones(shape)}))


def test_biases_of_only_some_layers_are_rejected(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"not part of the model: blk\.1\.attn_q\.bias"):
        converted(edited(llama, tensors={"blk.1.attn_q.bias": np.ones(32)}))


def test_a_missing_tensor_is_rejected_by_name(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"1 of \d+ tensors are missing: model\.norm\.weight"):
        converted(edited(llama, tensors={"output_norm.weight": None}))


def test_nan_and_infinity_are_rejected(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"output_norm\.weight contains NaN"):
        converted(edited(llama, tensors={"output_norm.weight": np.full(32, np.nan)}))


def test_a_llama_with_biases_of_queries_keys_and_values_becomes_a_qwen_2(llama: Path) -> None:
    """Llama's configuration does not support this; Qwen 2 computes the same."""
    parts = {"q": 32, "k": 16, "v": 16}
    biases = {
        f"blk.{layer}.attn_{part}.bias": np.linspace(-1, 1, size)
        for layer in range(3)
        for part, size in parts.items()
    }
    folder = converted(edited(llama, tensors=biases))
    assert config(folder)["model_type"] == "qwen2"
    assert not torch.allclose(logits(folder), logits(converted(llama)), atol=0.1)


def test_arbitrary_frequency_divisors_are_kept(llama: Path) -> None:
    divisors = [1.0, 1.0, 3.0, 2.0]
    folder = converted(edited(llama, tensors={"rope_freqs.weight": np.array(divisors)}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert_close(model.model.rotary_emb.inv_freq, plain / torch.tensor(divisors))
    # A student pruned from such a teacher can be written as GGUF.
    write_gguf(folder, folder / "again.gguf", FORMATS["f32"], name="tiny")
    assert torch.equal(logits(converted(folder / "again.gguf")), logits(folder))


@pytest.mark.parametrize("name", ["phi3, longrope", "phi3, partial rotary"])
def test_logits_match_beyond_the_original_context(tmp_path: Path, name: str) -> None:
    ids = torch.randint(4, 256, (1, LONG_SIZES["original_max_position_embeddings"] + 20))
    file, model = gguf(tmp_path, name)
    assert_close(logits(converted(file), ids), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


# --- tokens ---------------------------------------------------------------------------------------


def test_the_tokenizer_of_our_own_export_is_unchanged(tmp_path: Path) -> None:
    """transformers would add GPT-2's <|endoftext|> to every tokenizer that it reads from GGUF."""
    words = tiny.merging_tokenizer()
    folder = converted(gguf(tmp_path, "llama")[0])
    read = load_tokenizer(folder)
    assert read.get_vocab() == words.get_vocab()
    assert read.all_special_tokens == words.all_special_tokens
    assert read.chat_template == words.chat_template
    text = "the cat <|end|> sees 42 trees"
    assert read(text)["input_ids"] == words(text)["input_ids"]


def test_answers_end_at_the_same_tokens_as_in_llama_cpp(llama: Path) -> None:
    folder = converted(edited(llama, {"tokenizer.ggml.eot_token_id": 2}))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]


def test_padding_rows_of_the_embeddings_do_not_become_tokens(tmp_path: Path) -> None:
    words = tiny.merging_tokenizer()
    tiny.llama(vocab_size=320).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", FORMATS["f32"], name="tiny")
    folder = converted(tmp_path / "model.gguf")
    assert config(folder)["vocab_size"] == 320
    assert load_tokenizer(folder).get_vocab() == words.get_vocab()


@pytest.mark.parametrize(
    ("rules", "text", "pieces"),
    [
        ("smollm", "aa  12", ["aa", "ĠĠ", "1", "2"]),
        ("gpt-2", "aa  12", ["aa", "Ġ", "Ġ12"]),
        ("deepseek-coder", "a b.12", ["a", "Ġb", ".", "1", "2"]),
        ("qwen2", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "a 1234", ["a", "Ġ", "123", "4"]),
    ],
)
def test_text_is_split_by_the_rules_that_the_file_names(
    llama: Path, rules: str, text: str, pieces: list[str]
) -> None:
    read = load_tokenizer(converted(edited(llama, {"tokenizer.ggml.pre": rules})))
    found = read.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize("name", sentencepiece.RULES)
def test_a_sentencepiece_tokenizer_is_unchanged(tmp_path: Path, name: str) -> None:
    words = sentencepiece.write(tmp_path, name)
    read = load_tokenizer(converted(tmp_path / "toy.gguf"))
    assert read.get_vocab() == words.get_vocab()
    for text in sentencepiece.TEXTS:
        assert read(text)["input_ids"] == words(text)["input_ids"], text


def test_no_space_is_added_before_text_if_the_file_says_so(tmp_path: Path) -> None:
    sentencepiece.write(tmp_path, "mistral")
    file = edited(tmp_path / "toy.gguf", {"tokenizer.ggml.add_space_prefix": False})
    read = load_tokenizer(converted(file))
    assert read.convert_ids_to_tokens(read("the cat")["input_ids"])[:3] == ["<s>", "the", "▁cat"]
