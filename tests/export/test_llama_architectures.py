"""llama.cpp and the model that a GGUF file is converted to agree, for every architecture.

So does the model that a float32 file was written from. `make test-llama` runs these tests, because
llama-cpp-python is not part of the development environment.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import resolve_model
from tests.gguf_files import llama_cpp_logits, real
from tests.gguf_models import MODELS, save

pytestmark = [real, pytest.mark.run]

IDS = torch.randint(4, 256, (1, 300), generator=torch.Generator().manual_seed(9))
SHORT = IDS[:, :48]

LIMITS = {"f32": 1e-4, "q8_0": 0.01, "q4_0": 0.02}
"""Nats/token between llama.cpp and the same weights in float32. Its KV cache is float16, and with
quantized weights it rounds the inputs of matrix products to 8 bits."""


def converted(file: Path) -> torch.nn.Module:
    found = resolve_model(str(file), base=file.parent, cache=file.parent)
    return load_model(found.path, dtype=torch.float32)


def kl(expected_LV: torch.Tensor, found_LV: torch.Tensor) -> float:
    """Of the median token: if two experts are almost equally likely, rounding may swap them."""
    p_LV, q_LV = expected_LV.log_softmax(-1), found_LV.log_softmax(-1)
    return float((p_LV.exp() * (p_LV - q_LV)).sum(-1).median())


@pytest.mark.parametrize("form", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_agrees_with_the_model_that_the_file_is_converted_to(
    tmp_path: Path, name: str, form: str
) -> None:
    model = save(tmp_path / "model", name)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path / "model", file, FORMATS[form], name="tiny")
    found_LV = llama_cpp_logits(file, SHORT[0], context=256)
    assert kl(converted(file)(input_ids=SHORT).logits[0], found_LV) < LIMITS[form]
    if form == "f32":
        assert kl(model(input_ids=SHORT, use_cache=False).logits[0], found_LV) < LIMITS[form]


@pytest.mark.parametrize("name", [name for name in MODELS if "longrope" in name])
def test_longrope_agrees_on_text_longer_than_the_original_context(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path / "model", name)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path / "model", file, FORMATS["f32"], name="tiny")
    found_LV = llama_cpp_logits(file, IDS[0], context=512)
    assert kl(converted(file)(input_ids=IDS).logits[0], found_LV) < LIMITS["f32"]
