"""A stage is finished only after the model that it wrote has been checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stillhouse
from stillhouse import runfolder
from stillhouse.commands import run as run_task
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import ModelError, TrainingError
from stillhouse.teachers.load_model import check_loadable
from stillhouse.training.trainer import DistillationTrainer
from tests import tiny
from tests.classify import toys as tasks
from tests.teachers.toys import CONFIGS, save_model, tiny_model


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_saved_model_passes_the_check(tmp_path: Path, kind: str) -> None:
    check_loadable(save_model(tmp_path, tiny_model(kind)))


@pytest.mark.parametrize("damage", ["missing", "not part of the model", "of a different shape"])
def test_weights_that_do_not_fit_the_config_are_detected(tmp_path: Path, damage: str) -> None:
    folder = save_model(tmp_path, tiny_model("llama"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "of a different shape":
        weights[name] = weights[name][:-1].clone()
    else:
        weights["other"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"1 weights are {damage}"):
        check_loadable(folder)


def test_a_truncated_file_is_detected(tmp_path: Path) -> None:
    file = save_model(tmp_path, tiny_model("llama")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        check_loadable(tmp_path)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages whose product is checked, as they run."""
    names: list[str] = []
    check = runfolder._check_product

    def recording(name, folder, checking):  # type: ignore[no-untyped-def]
        names.append(name)
        check(name, folder, checking)

    monkeypatch.setattr(runfolder, "_check_product", recording)
    return names


def with_a_model(run: Path) -> list[str]:
    """The stages that wrote a model, without exports, which are checked separately."""
    names = [path.parent.name.rpartition("-")[0] for path in run.glob("stages/*/model")]
    return sorted(name for name in names if name != "export")


@pytest.mark.run
def test_every_stage_that_writes_a_model_is_checked(tmp_path: Path, checked: list[str]) -> None:
    words = tiny.merging_tokenizer()
    tiny.save_model(tmp_path / "teacher", vocab_size=len(words))
    words.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    raw = tiny.recipe(
        tmp_path,
        student={"vocabulary": len(words) - 1},
        evaluate={"fine_tuning_baseline": True},
        quantize={"qat": {"tokens": 200}},
    )
    stillhouse.run(raw)
    assert sorted(checked) == with_a_model(tmp_path / "run")
    assert {"vocabulary", "student", "train", "baseline", "quantize", "qat"} == set(checked)


@pytest.mark.run
def test_every_stage_of_a_task_that_writes_a_model_is_checked(
    tmp_path: Path, checked: list[str]
) -> None:
    raw = tasks.recipe(tmp_path, data=tasks.with_gold(tmp_path))
    run_task(parse_recipe(raw))
    assert sorted(checked) == with_a_model(tmp_path / "run")
    assert {"student", "train"} <= set(checked)


@pytest.mark.run
def test_checkpoints_are_kept_if_the_trainer_saves_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command then finishes the run without another training step."""
    raw = tiny.recipe(tmp_path, train={"max_steps": 6})
    save_model = DistillationTrainer.save_model

    def checkpoints_only(trainer, folder, _internal_call=False):  # type: ignore[no-untyped-def]
        if _internal_call:
            save_model(trainer, folder, _internal_call=True)

    monkeypatch.setattr(DistillationTrainer, "save_model", checkpoints_only)
    with pytest.raises(TrainingError, match="the trained model was not saved") as caught:
        stillhouse.run(raw)
    assert "the checkpoints are kept" in str(caught.value)
    stages = tmp_path / "run" / "stages"
    assert not list(stages.glob("train-*"))
    assert list(stages.glob(".train-*.partial/checkpoints/checkpoint-6"))

    monkeypatch.setattr(DistillationTrainer, "save_model", save_model)
    monkeypatch.setattr(DistillationTrainer, "training_step", None)  # every step was taken
    stillhouse.run(raw)
    assert list(stages.glob("train-*/model/model.safetensors"))
