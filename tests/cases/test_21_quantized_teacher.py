"""A quantized teacher that this machine cannot load is rejected before anything is computed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.errors import ModelError
from stillhouse.export.gguf_file import FORMATS, write_gguf
from tests import tiny

# package that the method needs: (method, settings)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "optimum": ("gptq", {"bits": 4, "group_size": 128, "desc_act": False}),
    "gptqmodel": ("awq", {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}),
    "bitsandbytes": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "compressed-tensors": (
        "compressed-tensors",
        {
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}
            },
        },
    ),
    "optimum-quanto": ("quanto", {"weights": "int8"}),
    "aqlm": ("aqlm", {}),
    "auto-round": ("auto-round", {"bits": 4, "group_size": 128}),
}


def quantized(folder: Path, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    recipe = tiny.recipe(folder)
    file = folder / "teacher" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    file.write_text(json.dumps(config))
    return recipe


@pytest.mark.parametrize("package", METHODS)
def test_check_names_the_package_and_what_works_instead(tmp_path: Path, package: str) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is not None:
        pytest.skip(f"{package} is installed")
    method, settings = METHODS[package]
    last = check_recipe(quantized(tmp_path, method, settings))[-1]
    assert last.level == "error"
    assert method in last.text
    assert package in last.text
    for way_out in ("the unquantized model", ".gguf", "signals.server"):
        assert way_out in (last.fix or "")


@pytest.mark.parametrize(
    "settings", [{"quant_method": "exl2", "bits": 4}, {"quant_method": "modelopt"}, {"bits": 4}]
)
def test_check_rejects_an_unknown_method(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = quantized(tmp_path, settings.get("quant_method", "nothing"), settings)
    last = check_recipe(recipe)[-1]
    assert last.level == "error"
    assert "cannot be loaded here" in last.text


def test_run_rejects_a_quantized_teacher_before_any_stage(tmp_path: Path) -> None:
    recipe = quantized(tmp_path, *METHODS["bitsandbytes"])
    with pytest.raises(ModelError, match="bitsandbytes"):
        run(recipe)
    assert not [*(tmp_path / "run" / "stages").iterdir()]


def test_check_rejects_a_student_that_starts_from_quantized_weights(tmp_path: Path) -> None:
    recipe = quantized(tmp_path, "fp8", {"weight_block_size": [128, 128]})
    last = check_recipe(recipe)[-1]
    assert last.level == "error"
    assert "cannot be trained" in last.text


@pytest.mark.run
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_quantized_gguf_file_can_be_the_teacher_or_the_student(tmp_path: Path, role: str) -> None:
    """The error about quantized weights recommends it; its weights are loaded as floats."""
    words = tiny.merging_tokenizer()
    model = tiny.llama(vocab_size=len(words), hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path / "teacher", file, FORMATS["q4_0"], name="tiny")
    recipe = tiny.recipe(tmp_path, train={"max_steps": 2})
    recipe["student"] = {"start": "pretrained", "model": str(tmp_path / "teacher")}
    recipe[role]["model"] = str(file)
    assert not [finding for finding in check_recipe(recipe) if finding.level == "error"]
    run(recipe)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
