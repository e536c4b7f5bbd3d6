"""How llm-compressor is called in a different Python. A stub package stands in for it."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from stillhouse.errors import ModelError
from stillhouse.export.compressed import (
    announce_compressed,
    export_compressed,
    fitting_group,
    require_llm_compressor,
)
from stillhouse.export.export_formats import COMPRESSED
from stillhouse.export.gate import Gate
from tests.export.conftest import ToyWindows

STUB = """
import json
from pathlib import Path

def oneshot(model, tokenizer, recipe, dataset=None, **options):
    call = {
        "recipe": [[type(m).__name__, m.options] for m in recipe],
        "rows": None if dataset is None else len(dataset),
        "samples": options.get("num_calibration_samples"),
    }
    Path(__file__).with_name("asked.json").write_text(json.dumps(call, default=vars))
    save = model.save_pretrained
    model.save_pretrained = lambda out, save_compressed: save(out)

class Modifier:
    def __init__(self, **options):
        self.options = options
"""
SCHEMES = """
from types import SimpleNamespace

def preset_name_to_scheme(name, targets):
    return SimpleNamespace(
        preset=name, targets=targets, weights=SimpleNamespace(group_size=128)
    )
"""
MODIFIER = "from llmcompressor import Modifier\nclass {}(Modifier): pass\n"
MODULES = {
    "llmcompressor/__init__": STUB,
    "llmcompressor/modifiers/gptq": MODIFIER.format("GPTQModifier"),
    "llmcompressor/modifiers/transform": MODIFIER.format("AWQModifier"),
    "llmcompressor/modifiers/quantization": MODIFIER.format("QuantizationModifier"),
    "llmcompressor/pipelines/cache": "class IntermediatesCache: pass\n",
    "compressed_tensors/__init__": "",
    "compressed_tensors/quantization": SCHEMES,
}


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter that has the stub package."""
    site = tmp_path / "site"
    for name, text in MODULES.items():
        module = site / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(text)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return str(script)


def export(source: Path, out: Path, python: str | None, method: str) -> Any:
    windows = [ToyWindows()[index] for index in range(3)]
    gate = Gate(source, ToyWindows(), [], seed=0)
    return export_compressed(gate, out, method=method, python=python, windows=windows)


@pytest.mark.run
@pytest.mark.parametrize(
    ("method", "modifiers", "scheme", "group", "rows"),
    [
        pytest.param("gptq", ["GPTQModifier"], "W4A16", 16, 3, marks=pytest.mark.slow),
        ("awq", ["AWQModifier", "QuantizationModifier"], "W4A16", 16, 3),
        pytest.param(
            *("fp8", ["QuantizationModifier"], "FP8_DYNAMIC", None, None), marks=pytest.mark.slow
        ),
    ],
)
def test_llm_compressor_gets_a_scheme_and_its_output_is_replayed(
    trained: Path,
    tmp_path: Path,
    python: str,
    method: str,
    modifiers: list[str],
    scheme: str,
    group: int | None,
    rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if group is not None:
        known = replace(COMPRESSED[method], groups=(128, group))
        monkeypatch.setitem(COMPRESSED, method, known)
    result = export(trained, tmp_path / "out", python, method)
    asked = json.loads((tmp_path / "site" / "llmcompressor" / "asked.json").read_text())
    assert [name for name, _ in asked["recipe"]] == modifiers
    weights = {"group_size": group or 128}
    asked_scheme = {"preset": scheme, "targets": ["Linear"], "weights": weights}
    options = {"config_groups": {"group_0": asked_scheme}, "ignore": ["lm_head"]}
    assert asked["recipe"][-1][1] == options
    assert asked["rows"] == asked["samples"] == rows
    assert result.format == f"compressed-{method}"
    assert 0 < result.kl < result.kl_limit
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.run
def test_an_error_in_llm_compressor_is_reported(trained: Path, tmp_path: Path, python: str) -> None:
    broken = tmp_path / "site" / "llmcompressor" / "__init__.py"
    broken.write_text("raise RuntimeError('no kernel for this model')")
    with pytest.raises(ModelError, match="no kernel for this model"):
        export(trained, tmp_path / "out", python, "gptq")


def test_the_error_for_a_missing_package_names_it_and_the_extra(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="compressed-tensors") as caught:
        export(trained, tmp_path / "out", None, "fp8")
    assert "stillhouse[llm-compressor]" in str(caught.value.fix)


@pytest.mark.run
@pytest.mark.parametrize("named", [None, sys.executable, "/no/such/python"])
def test_an_interpreter_without_llm_compressor_is_rejected(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ModelError, match="llm-compressor") as caught:
        export(trained, tmp_path / "out", named, "fp8")
    assert "install llmcompressor" in str(caught.value.fix)


def test_an_interpreter_that_is_too_old_for_the_scripts_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    script = tmp_path / "python3.10"
    script.write_text('#!/bin/sh\n[ "$1" = -P ] && echo "Unknown option: -P" >&2 || echo 1\n')
    script.chmod(0o755)
    with pytest.raises(ModelError, match=r"\(3.11 or newer\) with llm-compressor"):
        require_llm_compressor(str(script))


@pytest.mark.parametrize(
    ("method", "hidden", "ffn", "group"),
    [
        ("gptq", 512, 1536, 128),
        ("gptq", 576, 1536, 64),
        ("awq", 576, 1568, 32),
        ("fp8", 576, 1, None),
    ],
)
def test_the_group_size_is_the_largest_that_divides_every_width(
    method: str, hidden: int, ffn: int, group: int | None
) -> None:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_attention_heads=8)
    assert fitting_group(method, config) == group
    assert announce_compressed(method, config) is None


def test_rows_that_do_not_divide_into_groups_are_announced() -> None:
    config = LlamaConfig(hidden_size=576, intermediate_size=1000, num_attention_heads=9)
    found = announce_compressed("gptq", config)
    assert found is not None
    assert "intermediate_size 1,000 does not divide into groups of 32" in found[0]
    assert "992 or 1,024" in found[1]
    assert announce_compressed("fp8", config) is None


def test_attention_narrower_than_the_groups_is_announced() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=1, head_dim=24)
    found = announce_compressed("awq", config)
    assert found is not None
    assert "num_attention_heads × head_dim 24" in found[0]
