"""Every model's LM head is compared with the model's own logits, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

import stillhouse
from stillhouse.errors import ModelError
from stillhouse.teachers import load_model as local
from stillhouse.teachers.backbone import check_head
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.stored_head import load_head
from tests import tiny
from tests.teachers.toys import CONFIGS, save_model, tiny_model


@pytest.fixture
def doubled_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Llama models double their logits, without a configuration key for it."""
    forward = LlamaForCausalLM.forward

    def doubling(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = forward(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubling)


@pytest.mark.run
@pytest.mark.usefixtures("doubled_logits")
@pytest.mark.parametrize("student", ["pruned", "pretrained"])
def test_a_run_rejects_a_teacher_with_an_unknown_logit_scale(tmp_path: Path, student: str) -> None:
    raw = tiny.recipe(tmp_path)
    if student == "pretrained":
        model = tiny.save_model(tmp_path / "student", seed=1)
        raw["student"] = {"start": "pretrained", "model": str(model)}
    with pytest.raises(ModelError, match="LlamaForCausalLM are not a linear map"):
        stillhouse.run(raw)
    assert not list((tmp_path / "run").glob("stages/*train*"))


@pytest.mark.run
def test_a_run_checks_each_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def counting(model):  # type: ignore[no-untyped-def]
        checked.append(model.config.name_or_path)
        check_head(model)

    monkeypatch.setattr(local, "check_head", counting)
    raw = tiny.recipe(tmp_path, signals={"encoding": {"kind": "hidden"}})
    stillhouse.run(raw)
    assert len(checked) == len(set(checked))
    assert str(tmp_path / "teacher") in checked
    stages = {Path(path).parent.name.split("-")[0] for path in checked}
    assert {"student", "train"} <= stages


@pytest.mark.usefixtures("doubled_logits")
def test_a_head_that_is_loaded_alone_is_checked(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tiny_model("llama"))
    with pytest.raises(ModelError, match="not a linear map"):
        load_head(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "cohere", "granite", "gemma2", "qwen3_moe"])
def test_loading_a_head_alone_reads_no_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = save_model(tmp_path, tiny_model(kind))
    expected = load_model(folder, dtype=torch.float32).get_output_embeddings().weight
    local._checked.clear()
    monkeypatch.setattr("stillhouse.teachers.stored_head.load_model", None)
    head = load_head(folder, dtype=torch.float32)
    assert torch.equal(head.weight_VD, expected)
    assert len(local._checked) == 1


def test_a_head_of_integers_without_scales_is_rejected(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tiny_model("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = (9 * tensors["lm_head.weight"]).to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="without scales"):
        load_head(folder, dtype=torch.float32)


def test_the_head_of_a_model_that_bypasses_its_backbone_is_checked(tmp_path: Path) -> None:
    """OPT's logits come from `model.decoder`, not from `model`."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=96, num_attention_heads=4, max_position_embeddings=64, **sizes)
    model = OPTForCausalLM(config).eval()
    check_head(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_head(tmp_path, dtype=torch.float32).weight_VD, model.lm_head.weight)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ModelError, match="not a linear map"):
        check_head(model)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_models_in_bfloat16_pass_and_are_unchanged(kind: str) -> None:
    model = tiny_model(kind).to(torch.bfloat16)
    check_head(model)
    assert "forward" not in vars(model.base_model)


def test_a_vocabulary_of_two_tokens_is_enough() -> None:
    check_head(tiny_model("llama", vocab_size=2, pad_token_id=0, bos_token_id=1, eos_token_id=1))


def test_an_unknown_logit_softcap_is_detected() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=30.0)
    check_head(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 30 * (output / 30).tanh())
    with pytest.raises(ModelError, match="not a linear map"):
        check_head(model)
