"""How llama.cpp's quantizer is called; the last tests call the real one if it is installed."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.export import gguf_export, llama_quantizer
from stillhouse.export.gate import Gate
from stillhouse.export.gguf_export import export_gguf
from stillhouse.export.llama_quantizer import has_llama_cpp, importance_matrix, k_quantize
from stillhouse.quantize.moments import input_moments
from tests import tiny
from tests.export.conftest import ToyWindows
from tests.gguf_files import real

QUERY = "model.layers.0.self_attn.q_proj.weight"


class Entry(ctypes.Structure):
    """`llama_model_imatrix_data` in llama.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    words = tiny.merging_tokenizer()
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = tiny.llama(vocab_size=len(words), initializer_range=0.05, **shape)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def gate(source: Path) -> Gate:
    return Gate(source, windows=ToyWindows(), prompts=["the cat sees 42 trees"], seed=0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces llama.cpp by a stub that copies the file; returns what it was called with."""
    asked: dict[str, Any] = {}
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

    def quantize(whole: bytes, file: bytes, params: SimpleNamespace) -> int:
        asked["ftype"], asked["imatrix"] = params.ftype, getattr(params, "imatrix", None)
        kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(whole.decode()).tensors}
        assert kinds == {gguf.GGMLQuantizationType.F32}
        shutil.copy(whole.decode(), file.decode())
        asked["log"][-1](1, b"a line about every tensor", None)
        asked["log"][-1](3, b"a tensor has ", None)
        asked["log"][-1](5, b"NaN in it", None)
        return int(asked.get("code", 0))

    fake = SimpleNamespace(
        LLAMA_FTYPE_MOSTLY_Q4_K_M=15,
        llama_model_quantize_default_params=SimpleNamespace,
        llama_model_quantize=quantize,
        llama_model_imatrix_data=Entry,
        llama_log_callback=callback,
        llama_log_get=lambda callback, data: None,
        llama_log_set=lambda callback, data: asked.setdefault("log", []).append(callback),
    )
    monkeypatch.setattr(llama_quantizer, "llama_cpp_fault", lambda: None)
    monkeypatch.setattr(gguf_export, "has_llama_cpp", lambda: False)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    return asked


def test_k_quants_need_llama_cpp(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed") as caught:
        export_gguf(gate(source), tmp_path / "out", kind="q4_k_m", name="toy")
    assert "gguf-q4_0" in str(caught.value.fix)


def test_a_build_of_llama_cpp_that_does_not_load_counts_as_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text(
        "raise RuntimeError('Failed to load shared library: GLIBC_2.99 not found')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    assert not has_llama_cpp()
    with pytest.raises(ModelError, match=r"does not load .*GLIBC_2.99 not found"):
        llama_quantizer.require_llama_cpp()


def test_k_quants_are_made_by_llama_cpp_from_the_float32_file(
    source: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    result = export_gguf(gate(source), tmp_path / "out", kind="q4_k_m", name="toy")
    assert asked["ftype"] == 15
    assert asked["imatrix"] is None
    assert result.kl == pytest.approx(0, abs=1e-9)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Modelfile", "toy-q4_k_m.gguf"]
    assert result.decode_tokens_per_s is None, "transformers is not this file's runtime"


def test_llama_cpps_error_message_is_reported(
    source: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    asked["code"] = 1
    with pytest.raises(ModelError, match="a tensor has NaN in it"):
        k_quantize(source, tmp_path / "toy.gguf", kind="q4_k_m", name="toy")
    assert len(asked["log"]) == 2, "the log callback is restored"


def test_moments_are_passed_under_the_names_of_gguf(
    source: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    moments = {QUERY: torch.arange(256.0), "model.embed_tokens.weight": torch.ones(256)}
    k_quantize(source, tmp_path / "toy.gguf", kind="q4_k_m", name="toy", moments=moments)
    rows = asked["imatrix"]
    assert [row.name for row in rows] == [b"blk.0.attn_q.weight", b"token_embd.weight", None]
    assert rows[0].size == 256
    assert rows[0].data[255] == 255
    assert 0 < rows[0].data[0] < 1e-3, "an input that was never seen still counts a little"


def test_moments_are_those_of_each_layers_inputs() -> None:
    """Agrees with inputs captured one window at a time, for a layer and for the LM head."""
    model = tiny.llama(vocab_size=64)
    windows = ToyWindows()
    found = input_moments(model, windows)
    caught = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda _m, inputs, _o: caught.append(inputs[0]))
    final = []
    for index in range(len(windows)):
        window = windows[index]
        ids, positions = window["input_ids"][None], window["position_ids"][None]
        output = model(input_ids=ids, position_ids=positions, use_cache=False,
                       output_hidden_states=True)  # fmt: skip
        final.append(output.hidden_states[-1])
    handle.remove()
    inputs_NI = torch.cat(caught).flatten(0, -2)
    expected_I = inputs_NI.square().mean(0)
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj.weight"], expected_I)
    hidden_ND = torch.cat(final).flatten(0, -2)
    torch.testing.assert_close(found["model.embed_tokens.weight"], hidden_ND.square().mean(0))
    assert len(found) == 3 * 7 + 1


# --- the real llama.cpp --------------------------------------------------------------------------


@real
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_llama_cpp_is_as_close_to_the_source_as_the_replay(
    source: Path, tmp_path: Path, kind: str
) -> None:
    moments = input_moments(tiny.llama(vocab_size=264, hidden_size=256, intermediate_size=512,
                                       num_hidden_layers=2), ToyWindows())  # fmt: skip
    result = export_gguf(gate(source), tmp_path / "out", kind=kind, name="toy", moments=moments)
    assert result.llama_cpp is not None
    assert abs(result.llama_cpp.kl - result.kl) < 0.02
    assert result.decode_tokens_per_s is not None
    assert result.texts[0].exported


@real
def test_an_importance_matrix_changes_what_llama_cpp_rounds(source: Path, tmp_path: Path) -> None:
    import llama_cpp

    moments = {QUERY: torch.linspace(0.01, 100, 256) ** 2}
    assert importance_matrix(llama_cpp, moments, {QUERY: "a"})[1].name is None
    tensors = {}
    for name, weighted in (("plain", None), ("weighted", moments)):
        file = tmp_path / f"{name}.gguf"
        k_quantize(source, file, kind="q4_k_m", name="toy", moments=weighted)
        tensors[name] = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    changed = [
        name for name, data in tensors["plain"].items() if (data != tensors["weighted"][name]).any()
    ]
    assert changed == ["blk.0.attn_q.weight"]
