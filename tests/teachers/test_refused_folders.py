"""Invalid model folders that transformers would load without an error are rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.errors import ModelError
from stillhouse.evaluation.evaluate import weight_bytes
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.planned_model import check_model_folder
from stillhouse.teachers.weights import stored_dtypes, weight_files
from tests import tiny

Tensors = dict[str, torch.Tensor]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "m")


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(folder, dtype=torch.float32)
    assert caught.value.where
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_rejected(folder: Path, value: float) -> None:
    rewrite(folder, lambda tensors: tensors[UP].view(-1)[5].fill_(value))
    assert f"{UP} contains values that are not finite" in refusal(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool])
def test_integer_weights_without_scales_are_rejected(folder: Path, kind: torch.dtype) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP: (tensors[UP] * 9).to(kind)}))
    assert "without scales" in refusal(folder)


def test_a_separate_head_with_tied_embeddings_is_rejected(folder: Path) -> None:
    """Some programs would use the tied embeddings, others the head."""
    embeddings = "model.embed_tokens.weight"
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[embeddings] + 1}))
    assert "ties the head to the embeddings, but the weights contain a different head" in refusal(
        folder
    )
    edit(folder, "config.json", tie_word_embeddings=False)  # the first suggested fix
    untied = load_model(folder, dtype=torch.float32)
    edit(folder, "config.json", tie_word_embeddings=True)
    rewrite(folder, lambda t: t.pop("lm_head.weight"))  # the second suggested fix
    tied = load_model(folder, dtype=torch.float32)
    assert torch.equal(untied.lm_head.weight, tied.lm_head.weight + 1)


def test_a_head_that_equals_tied_embeddings_is_accepted(folder: Path) -> None:
    same = "model.embed_tokens.weight"
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[same].clone()}))
    load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_weights_of_a_wrapped_model_are_rejected(folder: Path, prefix: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f"begin with {prefix}" in refusal(folder)


def test_weights_that_are_all_zero_are_rejected(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    assert "all values of the embeddings are 0" in refusal(folder)


def test_weights_in_one_file_and_in_shards_are_rejected(folder: Path) -> None:
    """transformers reads the file, and vLLM the shards."""
    name = "model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(folder, dtype=torch.float32)  # an index without shards is ignored
    (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
    assert "a model's weights twice" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "no metadata" in refusal(folder)
    edit(folder, "model.safetensors.index.json", metadata={})
    load_model(folder, dtype=torch.float32)


def test_an_unused_file_of_weights_is_ignored(folder: Path) -> None:
    """Mistral's repositories contain a second copy of all weights in such a file."""
    names = ("model.safetensors", "consolidated.safetensors")
    size = (folder / names[0]).stat().st_size
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b""):
        (folder / names[1]).write_bytes(content)
        teacher = load_teacher(ModelSource(folder), dtype=torch.float32)
        teacher.place(torch.device("cpu"), 16)
        assert stored_dtypes(folder) == {"F32"}
        assert weight_bytes(folder, None, None) == size


def test_shards_may_be_named_relative_to_the_folder(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    index = folder / "model.safetensors.index.json"
    places = dict.fromkeys(tensors, "./all.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert weight_files(folder) == [folder / "all.safetensors"]
    load_model(folder, dtype=torch.float32)


def test_an_adapter_next_to_the_model_is_rejected(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter in addition to the model" in refusal(folder)


@pytest.mark.parametrize("method", ["nonsense", "exl2", 7])
def test_an_unknown_quantization_is_rejected(folder: Path, method: object) -> None:
    edit(folder, "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert f"quantized with {method}" in refusal(folder)


@pytest.mark.parametrize("end", [10**6, -5, [10**6, -5], 1.5])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_cannot_be_generated_is_rejected(
    folder: Path, file: str, end: object
) -> None:
    edit(folder, file, eos_token_id=end)
    assert "eos_token_id" in refusal(folder)
    with pytest.raises(ModelError, match="eos_token_id"):
        check_model_folder(folder)  # before any weight is read


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 0), ("hidden_act", "no")])
def test_a_configuration_that_transformers_cannot_use_is_rejected(
    folder: Path, key: str, value: object
) -> None:
    edit(folder, "config.json", **{key: value})
    assert "transformers cannot" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 64),
        ("final_logit_softcapping", 30.0),
        ("attention_multiplier", 0.01),
        ("logit_scale", 0.0625),
        ("scale_emb", 12),
        ("clip_qkv", 8.0),
        ("no_rope_layers", [1, 1, 0]),
        ("partial_rotary_factor", 0.5),
        ("rotary_pct", 0.25),
    ],
)
def test_a_key_that_the_architecture_would_ignore_is_rejected(
    folder: Path, key: str, value: Any
) -> None:
    edit(folder, "config.json", **{key: value})
    assert f"config.json has {key}: {value}" in refusal(folder)
    edit(folder, "config.json", **{key: None})
    load_model(folder, dtype=torch.float32)


ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"rope_theta": 500.0}, "two different rotary embeddings: rope_theta is 500.0"),
        ({"rope_scaling": YARN}, "two different rotary embeddings: rope_scaling"),
        ({"rope_parameters": {**ROPE, **YARN}, "rope_scaling": {**YARN, "factor": 8.0}}, "two"),
        ({"rope_parameters": {**ROPE, "factor": 4.0}}, "without a rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"factor": 4.0}}, "without a rope_type"),
        (
            {"rope_parameters": {**ROPE, "rope_theta": 0}},
            "rope_theta must be a positive number, but is 0",
        ),
        (
            {"rope_parameters": None, "rope_theta": float("nan")},
            "rope_theta must be a positive number, but is nan",
        ),
        (
            {"rope_parameters": {**ROPE, **YARN, "factor": -4.0}},
            "factor must be a positive number, but is -4.0",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
    ],
)
def test_attention_keys_that_contradict_each_other_are_rejected(
    folder: Path, keys: dict[str, Any], what: str
) -> None:
    """transformers silently reads one of two values, and ignores a factor without a type."""
    edit(folder, "config.json", **keys)
    assert what in refusal(folder)
    with pytest.raises(ModelError, match=what):
        check_model_folder(folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 1e4, "rope_scaling": None},
        {"rope_parameters": {**ROPE, **YARN}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": YARN},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_attention_keys_that_agree_are_accepted(folder: Path, keys: dict[str, Any]) -> None:
    edit(folder, "config.json", **keys)
    load_model(folder, dtype=torch.float32)


def test_settings_for_outputs_are_ignored(folder: Path) -> None:
    edit(folder, "config.json", return_dict=False, output_hidden_states=True)
    model = load_model(folder, dtype=torch.float32)
    output = model(input_ids=torch.arange(3, 9)[None])
    assert output.hidden_states is None
    assert output.logits.shape[:2] == (1, 6)


def test_an_end_token_that_the_tokenizer_lacks_is_rejected(folder: Path) -> None:
    """transformers would add it after the others, where the model has no row, or only padding."""
    edit(folder, "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(ModelError, match="'<end>' is not in tokenizer"):
        load_tokenizer(folder)
    edit(folder, "tokenizer_config.json", eos_token="<|user|>")
    assert load_tokenizer(folder).eos_token == "<|user|>"


def test_a_tokenizer_with_dropout_is_rejected(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="at random"):
        load_tokenizer(folder)


def test_an_implausible_number_of_layers_is_rejected(folder: Path) -> None:
    """Building them would take hours, before they are compared with the weights."""
    edit(folder, "config.json", num_hidden_layers=10**9)
    assert "num_hidden_layers is 1,000,000,000" in refusal(folder)


def test_a_duplicate_key_is_rejected(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "rms_norm_eps": 0.5}')
    assert "'rms_norm_eps' is given twice" in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"n": ' + "9" * 5000 + "}"])
def test_a_configuration_that_python_cannot_read_is_rejected(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "cannot be read as JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("config.json", "text_config", 5), ("generation_config.json", "pad_token_id", "x")],
)
def test_a_value_of_the_wrong_type_is_one_error(
    folder: Path, file: str, key: str, value: object
) -> None:
    edit(folder, file, **{key: value})
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder)
    assert file in f"{caught.value.where} {caught.value.fix}"


@pytest.mark.parametrize("complete", [False, True], ids=["shards", "one file too"])
def test_an_index_with_an_impossible_file_name_is_one_error(folder: Path, complete: bool) -> None:
    index = {"weight_map": {UP: "z" * 300}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if complete:
        assert weight_files(folder) == [folder / "model.safetensors"]
        return
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="1 of 1 weight files are missing"):
        weight_files(folder)


def test_a_tensor_in_two_shards_is_rejected(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(tensors, folder / names[0], {"format": "pt"})
    save_file({UP: tensors[UP] * 2}, folder / names[1], {"format": "pt"})
    places = dict.fromkeys(tensors, names[0]) | {UP: names[1]}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(ModelError, match="in two files"):
        weight_files(folder)


def test_a_folder_without_tokenizer_files_is_rejected(folder: Path) -> None:
    """For many architectures, transformers creates a tokenizer of special tokens only."""
    edit(folder, "config.json", model_type="qwen2")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(folder)
