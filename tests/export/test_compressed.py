"""How llm-compressor is asked, in another Python; a package that changes nothing plays it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from stillhouse.errors import ModelError
from stillhouse.export import Gate, announce_compressed, compressed, export_compressed
from stillhouse.export.compressed import require_llm_compressor
from tests.export.conftest import ToyWindows

STUB = """
import json
from pathlib import Path

def oneshot(model, tokenizer, recipe, dataset=None, **options):
    told = {
        "recipe": [[type(m).__name__, m.options] for m in recipe],
        "rows": None if dataset is None else len(dataset),
        "samples": options.get("num_calibration_samples"),
    }
    Path(__file__).with_name("asked.json").write_text(json.dumps(told))
    save = model.save_pretrained
    model.save_pretrained = lambda out, save_compressed: save(out)

class Modifier:
    def __init__(self, **options):
        self.options = options
"""
MODIFIERS = {
    "gptq": "GPTQModifier",
    "transform": "AWQModifier",
    "quantization": "QuantizationModifier",
}


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter that has the package."""
    package = tmp_path / "site" / "llmcompressor"
    (package / "modifiers").mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    (package / "modifiers" / "__init__.py").touch()
    for module, name in MODIFIERS.items():
        text = f"from llmcompressor import Modifier\nclass {name}(Modifier):\n    pass\n"
        (package / "modifiers" / f"{module}.py").write_text(text)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{package.parent}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    return str(script)


def export(source: Path, out: Path, python: str | None, method: str) -> Any:
    windows = [ToyWindows()[index] for index in range(3)]
    gate = Gate(source, ToyWindows(), [], seed=0)
    return export_compressed(gate, out, method=method, python=python, windows=windows)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("method", "modifiers", "scheme", "rows"),
    [
        ("awq", ["AWQModifier", "QuantizationModifier"], "W4A16_ASYM", 3),
        ("fp8", ["QuantizationModifier"], "FP8_DYNAMIC", None),
    ],
)
def test_it_is_asked_for_a_scheme_and_its_answer_is_replayed(
    trained: Path,
    tmp_path: Path,
    python: str,
    method: str,
    modifiers: list[str],
    scheme: str,
    rows: int | None,
) -> None:
    result = export(trained, tmp_path / "out", python, method)
    asked = json.loads((tmp_path / "site" / "llmcompressor" / "asked.json").read_text())
    assert [name for name, _ in asked["recipe"]] == modifiers
    options = {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"]}
    assert asked["recipe"][-1][1] == options
    assert asked["rows"] == asked["samples"] == rows
    assert result.format == f"compressed-{method}"
    assert 0 < result.kl < result.kl_limit
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_it_says_of_a_failure_is_told(trained: Path, tmp_path: Path, python: str) -> None:
    broken = tmp_path / "site" / "llmcompressor" / "__init__.py"
    broken.write_text("raise RuntimeError('no kernel for this model')")
    with pytest.raises(ModelError, match="no kernel for this model"):
        export(trained, tmp_path / "out", python, "gptq")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="compressed-tensors") as caught:
        export(trained, tmp_path / "out", None, "fp8")
    assert "stillhouse[llm-compressor]" in str(caught.value.fix)


@pytest.mark.parametrize("named", [None, sys.executable, "/no/such/python"])
def test_an_interpreter_without_llm_compressor_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ModelError, match="llm-compressor") as caught:
        export(trained, tmp_path / "out", named, "fp8")
    assert "install llmcompressor" in str(caught.value.fix)


def test_awq_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ModelError, match="on a GPU alone") as caught:
        require_llm_compressor(sys.executable, "awq")
    assert "compressed-gptq" in str(caught.value.fix)


def test_rows_that_do_not_divide_into_groups_are_announced() -> None:
    config = LlamaConfig(hidden_size=576, intermediate_size=1536)
    found = announce_compressed("gptq", config)
    assert found is not None
    assert "hidden_size 576" in found[0]
    assert "512 or 640" in found[1]
    assert announce_compressed("nvfp4", config) is None
    assert announce_compressed("fp8", config) is None
