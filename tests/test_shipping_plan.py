"""`check` reports every export that is not possible and suggests one that is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.check import check_recipe
from stillhouse.export import llama_quantizer
from stillhouse.export import torchao as torchao_export
from stillhouse.finding import Finding
from stillhouse.teachers import gguf_families
from tests import tiny

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher whose tokenizer GGUF supports."""
    folder = tmp_path_factory.mktemp("plan")
    words = tiny.merging_tokenizer()
    tiny.llama(vocab_size=len(words)).save_pretrained(folder / "teacher")
    words.save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(tiny.text(400))
    return folder


def check(folder: Path, **sections: Any) -> list[Finding]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe(folder, **sections)))
    return check_recipe(path)


def error_of_check(folder: Path, **sections: Any) -> Finding:
    last = check(folder, **sections)[-1]
    assert last.level == "error"
    assert last.fix
    return last


def test_an_architecture_that_gguf_does_not_support_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(gguf_families.ARCHITECTURES, "llama")
    found = error_of_check(folder, export={"formats": ["gguf-q8_0"]})
    assert "the architecture llama" in found.text
    assert "export safetensors" in str(found.fix)


def test_the_check_is_given_the_number_of_layers_before_the_cut(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers depend on their index, which changes if layers before them are removed."""
    asked: list[int | None] = []

    def announce(*_: Any, layers_before: int | None) -> list[tuple[str, str]]:
        asked.append(layers_before)
        return []

    monkeypatch.setattr("stillhouse.language_model.export_check.announce_gguf", announce)
    check(folder, student={"layers": 2}, export={"formats": ["gguf-f16"]})
    assert asked == [3]


def test_a_grid_that_the_format_cannot_store_is_a_warning(folder: Path) -> None:
    found = check(folder, quantize={"group_size": 16}, export={"formats": ["gguf-q4_0"]})
    [warning] = [finding for finding in found if finding.topic == "export" and finding.fix]
    assert "cannot store int4 in groups of 16" in warning.text
    assert "group_size: 32" in str(warning.fix)
    found = check(folder, quantize={"group_size": 32}, export={"formats": ["gguf-q4_0"]})
    assert [finding for finding in found if finding.topic == "export" and finding.fix] == []


def test_k_quants_without_llama_cpp_are_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_quantizer, "llama_cpp_fault", lambda: "is not installed")
    found = error_of_check(folder, export={"formats": ["gguf-q4_k_m"]})
    assert "not installed" in found.text
    assert "gguf-q4_0 or gguf-q8_0" in str(found.fix)


def test_torchao_kernels_that_do_not_load_are_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    assert "error" not in {finding.level for finding in check(folder, quantize={})}

    def fail(*_: object) -> None:
        raise RuntimeError("undefined symbol: aoti_torch")

    monkeypatch.setattr(torchao_export, "_multiply", fail)
    found = error_of_check(folder, quantize={})
    assert "undefined symbol" in found.text
    assert "gguf-q4_0" in str(found.fix)


def test_float8_products_that_the_machine_lacks_are_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    original = torchao_export._multiply

    def old_gpu(grid: Any, dynamic: bool, dtype: Any) -> None:
        if dynamic:
            raise RuntimeError("torch._scaled_mm is only supported on compute capability >= 8.9")
        original(grid, dynamic, dtype)

    monkeypatch.setattr(torchao_export, "_multiply", old_gpu)
    sections = {"student": {"start": "pruned", "ffn_size": 32}}
    found = error_of_check(folder, **sections, quantize={"kind": "float8_dynamic_float8"})
    assert "float8 products in bfloat16 do not run on this" in found.text
    assert "compute capability >= 8.9" in found.text
    assert "kind: float8, which rounds only weights" in str(found.fix)
    weights_alone = check(folder, **sections, quantize={"kind": "float8"})
    assert "error" not in {finding.level for finding in weights_alone}


def test_a_missing_llm_compressor_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    found = error_of_check(folder, export={"formats": ["compressed-fp8"]})
    assert "separate environment" in found.text
    assert "pip install llmcompressor" in str(found.fix)


def test_llm_compressor_is_found_relative_to_the_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    python = folder / "llmc" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 1\n")
    python.chmod(0o755)
    export = {"formats": ["compressed-fp8"], "llm_compressor": "llmc/bin/python"}
    assert "error" not in {finding.level for finding in check(folder, export=export)}
    export["llm_compressor"] = "elsewhere/python"
    found = error_of_check(folder, export=export)
    assert "elsewhere/python is not a Python" in found.text, "the path as it is in the recipe"


def test_a_missing_token_for_the_hub_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = error_of_check(folder, export={"push_to_hub": {"repo": "me/small"}})
    assert "no token" in found.text


def test_only_the_exported_member_of_a_family_is_checked(folder: Path) -> None:
    """The first member's matrices can be divided into groups of 32, but not those of the last one,
    the only one that is exported."""
    hops = [{"name": "wide", "ffn_size": 32}, {"name": "narrow", "ffn_size": 24}]
    sections: dict[str, Any] = {
        "student": {"start": "pruned", "ffn_size": None},
        "cascade": {"ship": "last", "hops": hops},
    }
    found = check(folder, **sections, export={"formats": ["gguf-q8_0"]})
    [warning] = [finding for finding in found if finding.topic == "export" and finding.fix]
    assert warning.text.startswith("narrow: gguf-q8_0: intermediate_size 24")
    rounded = error_of_check(folder, **sections, quantize={"group_size": 32})
    assert "not a multiple of group_size 32" in rounded.text
