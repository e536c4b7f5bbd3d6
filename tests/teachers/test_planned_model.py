"""Model folders are checked before any weight is read, and each problem is one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.errors import ModelError, StillhouseError
from stillhouse.teachers.load_model import load_config
from stillhouse.teachers.model_requirements import (
    require_decoder,
    require_loadable,
    require_tokens,
)
from stillhouse.teachers.planned_model import check_model_folder, planned_model
from tests import tiny

V = len(tiny.tokenizer())
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
ENCODERS: dict[str, Callable[[], Any]] = {
    "BERT": lambda: BertLMHeadModel(BertConfig(**SMALL)),
    "RoBERTa": lambda: RobertaForCausalLM(RobertaConfig(**SMALL)),
    "ELECTRA": lambda: ElectraForCausalLM(ElectraConfig(**SMALL, embedding_size=32)),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    ),
}


def saved(folder: Path, **changes: Any) -> Path:
    """A tiny model with changed values in its config.json."""
    tiny.save_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("part", ["teacher", "student", "random"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_rejected_as_teachers_and_students(
    tmp_path: Path, kind: str, part: str
) -> None:
    torch.manual_seed(0)
    ENCODERS[kind]().save_pretrained(tmp_path / "encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "encoder")
    raw = tiny.recipe(tmp_path)
    encoder = str(tmp_path / "encoder")
    if part == "teacher":
        raw["teacher"]["model"] = encoder
    elif part == "student":
        raw["student"] = {"start": "pretrained", "model": encoder}
    else:
        raw["student"] = {"start": "random", "config": encoder}
    last = check_recipe(raw)[-1]
    assert last.level == "error"
    assert "encoder" in last.text
    with pytest.raises(ModelError, match="encoder"):
        run(raw)


def test_a_bert_decoder_is_accepted() -> None:
    require_decoder(BertConfig(**SMALL, is_decoder=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "squiggle"},
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        {"pad_token_id": 5000},
        {"num_attention_heads": 0},
        {"model_type": "llama_of_tomorrow"},
        {"hidden_size": "wide"},
    ],
)
def test_an_invalid_configuration_is_one_message(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        check_model_folder(saved(tmp_path / "teacher", **changes))
    assert caught.value.fix


def broken(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tiny.save_model(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.update({NAME: torch.zeros(3, 3)}), "a different shape"),
        (lambda tensors: tensors.pop(NAME), "missing"),
        (lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}), "not part"),
    ],
)
@pytest.mark.parametrize("part", ["teacher", "student", "teachers"])
def test_tensors_are_compared_with_the_configuration_by_check(
    tmp_path: Path, change: Any, problem: str, part: str
) -> None:
    raw = tiny.recipe(tmp_path)
    other = str(broken(tmp_path / "other", change))
    if part == "teacher":
        raw["teacher"]["model"] = other
    elif part == "student":
        raw["student"] = {"start": "pretrained", "model": other}
    else:
        raw["train"]["teachers"] = ["teacher", other]
    last = check_recipe(raw)[-1]
    assert last.level == "error"
    assert problem in last.text
    with pytest.raises(ModelError, match=problem):
        run(raw)
    assert not [*(tmp_path / "run" / "stages").iterdir()]


def test_a_shard_that_is_missing_or_a_pointer_is_found_by_check(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    teacher = tmp_path / "teacher"
    (teacher / "model.safetensors").unlink()
    tiny.llama().save_pretrained(teacher, max_shard_size="20KB")
    shard = sorted(teacher.glob("model-*.safetensors"))[1]
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 20000\n"
    shard.write_text(pointer)
    last = check_recipe(raw)[-1]
    assert "Git LFS pointer" in last.text
    assert "git lfs pull" in str(last.fix)
    shard.unlink()
    last = check_recipe(raw)[-1]
    assert f"weight files are missing: {shard.name}" in last.text


def test_files_without_read_permission_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.recipe(tmp_path)
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    last = check_recipe(raw)[-1]
    assert last.level == "error"
    assert "Permission denied" in last.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token_id", V),
        ("pad_token_id", -1),
        ("eos_token_id", V + 7),
        ("eos_token_id", [V, V + 1]),
    ],
)
def test_special_tokens_outside_the_vocabulary_are_rejected(
    tmp_path: Path, key: str, value: object
) -> None:
    config = load_config(saved(tmp_path / "teacher"))
    model = planned_model(config)
    setattr(config, key, value)
    with pytest.raises(ModelError, match=key):
        _require(config, model)


def _require(config: Any, model: Any) -> None:
    require_loadable(config)
    require_tokens(config, model)


def test_one_valid_end_token_of_several_is_enough(tmp_path: Path) -> None:
    config = load_config(saved(tmp_path / "teacher"))
    config.eos_token_id = [0, V + 7]
    require_tokens(config, planned_model(config))


def test_the_padding_token_cannot_be_an_image_token(tmp_path: Path) -> None:
    config = load_config(saved(tmp_path / "teacher"))
    config.pad_token_id, config.image_token_id = 3, 3
    with pytest.raises(ModelError, match="image"):
        require_loadable(config)


def test_a_teacher_with_non_finite_outputs_is_reported(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    broken(tmp_path / "teacher", lambda tensors: tensors[NAME].fill_(float("nan")))
    with pytest.raises(StillhouseError, match="finite"):
        run(raw)


def test_a_complete_model_passes(tmp_path: Path) -> None:
    config = check_model_folder(tiny.save_model(tmp_path / "teacher"))
    assert AutoModelForCausalLM.from_config(config).num_parameters() > 0
