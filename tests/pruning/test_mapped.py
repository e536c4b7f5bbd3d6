"""A large model is calibrated and cut in little more memory than it has on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from stillhouse.pruning import depth, hidden, mapped
from stillhouse.pruning.mapped import (
    let_go,
    let_go_after_use,
    load_on_disk,
    mapped_ranges,
    move_to_disk,
)
from stillhouse.pruning.mapped import save_model as write_model
from stillhouse.pruning.prune import prune_model
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.load import load_model
from tests.teachers.toys import ToyWindows, save_model, tiny_model, toy_tokenizer

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are let go on Linux only")
IDS = ToyWindows().ids[:2]


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@linux
def test_a_layer_on_disk_is_the_same_layer() -> None:
    model = tiny_model()
    expected = logits(model)
    for layer in model.base_model.layers:
        assert not mapped_ranges(layer)
        move_to_disk(layer)
        assert len(mapped_ranges(layer)) == len(list(layer.parameters()))
        let_go(mapped_ranges(layer))
    assert torch.equal(logits(model), expected)


@linux
def test_weights_that_were_written_to_are_not_let_go() -> None:
    model = tiny_model()
    layer = model.base_model.layers[0]
    move_to_disk(layer)
    layer.mlp.down_proj.weight.mul_(2)
    expected = logits(model)
    assert not mapped_ranges(layer)
    let_go(mapped_ranges(layer))
    assert torch.equal(logits(model), expected)


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [{"ffn_size": 40}, {"layers": 2}, {"heads": 2, "hidden_size": 24}]
)
def test_a_large_model_is_pruned_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: dict[str, Any]
) -> None:
    save_model(tmp_path, tiny_model().to(dtype))
    usual = load_model(tmp_path, dtype=torch.float32)
    prune_model(usual, ToyWindows(), **sizes)
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    large = load_on_disk(tmp_path)
    # Layers, embeddings and head; the last norm is too small to matter.
    on_disk = len(list(large.parameters())) - 1
    assert len(mapped_ranges(large)) >= on_disk
    assert {parameter.dtype for parameter in large.parameters()} == {torch.float32}
    prune_model(large, ToyWindows(), **sizes)
    with let_go_after_use(large):
        assert_close(logits(large), logits(usual))
    for name, value in usual.named_parameters():
        assert_close(dict(large.named_parameters())[name], value, msg=name)


@linux
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_written_layer_by_layer_is_the_one_that_transformers_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "usual")
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    (tmp_path / "large").mkdir()
    write_model(model, tmp_path / "large")
    usual = load_file(tmp_path / "usual" / "model.safetensors")
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == usual.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "large" / file)[name], usual[name])
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "large" / name).read_text() == (tmp_path / "usual" / name).read_text()
    listed = {*index["weight_map"].values(), "model.safetensors.index.json"}
    assert {file.name for file in (tmp_path / "large").iterdir()} == listed | {
        "config.json",
        "generation_config.json",
    }


def test_a_head_is_worked_on_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_VD = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    centered_VD = weight_VD - weight_VD.mean(0)
    monkeypatch.setattr(hidden, "BLOCK", 7)
    assert_close(hidden.head_gram(weight_VD), centered_VD.T @ centered_VD)
    whole, cut = tiny_model(), tiny_model()
    prune_model(cut, ToyWindows(), hidden_size=24)
    monkeypatch.undo()
    prune_model(whole, ToyWindows(), hidden_size=24)
    assert_close(logits(cut), logits(whole), rtol=1e-4, atol=1e-4)


def test_the_head_is_not_worked_on_where_the_hidden_size_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(hidden, "head_gram", refuse)
    prune_model(tiny_model(), ToyWindows(), ffn_size=40)


def test_fewer_rows_of_a_large_vocabulary_have_logits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, rows_ND = lm_head(tiny_model()), torch.randn(20, 32)
    expected = depth.summed_kl(head, rows_ND, [rows_ND + 0.1])
    asked: list[int] = []
    real = depth.head_logits

    def noted(head: Any, rows_nD: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows_nD))
        return real(head, rows_nD)

    monkeypatch.setattr(depth, "head_logits", noted)
    monkeypatch.setattr(depth, "CHUNK_LOGITS", 3 * len(head.weight_VD))
    assert depth.summed_kl(head, rows_ND, [rows_ND + 0.1]) == pytest.approx(expected, rel=1e-4)
    assert max(asked) == 3
    assert sum(asked) == 2 * 20


PROGRAM = """
import json, sys
from pathlib import Path
from stillhouse.hardware import peak_memory_bytes
from stillhouse.pruning import mapped
from stillhouse.students.student_config import PrunedStudent
from stillhouse.students.build_student import build_student
from stillhouse.teachers.model_source import resolve_model
from tests.teachers.toys import ToyWindows, tiny_model
mapped.LARGE_BYTES = 0
folder = Path(sys.argv[1])
# What Python, the libraries and one small model need, whatever the model's size.
from tests.pruning.test_mapped import warm_up
warm_up(folder)
start = peak_memory_bytes()
section = PrunedStudent.model_validate({"start": "pruned", **json.loads(sys.argv[2])})
build_student(section, teacher=resolve_model("model", base=folder), windows=ToyWindows(count=64),
              heldout=ToyWindows(count=8, seed=1), seed=0, base=folder, out=folder / "student")
print(json.dumps({"start": start, "peak": peak_memory_bytes()}))
"""


def warm_up(folder: Path) -> None:
    save_model(folder / "small")
    prune_model(load_on_disk(folder / "small"), ToyWindows(), ffn_size=40)


@linux
def test_memory_that_took_a_files_place_is_not_let_go() -> None:
    values = torch.arange(1 << 20)
    start = values.data_ptr()
    let_go([(start, start + values.numel() * values.element_size())])
    assert torch.equal(values, torch.arange(1 << 20))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [{"ffn_size": 1216}, {"layers": 29, "heads": 8}, {"hidden_size": 448}]
)
def test_peak_memory_is_at_most_a_fifth_above_the_model_as_it_is_stored(
    tmp_path: Path, dtype: torch.dtype, sizes: dict[str, Any]
) -> None:
    """Llama 3 8B at an eighth of its width and vocabulary, and all layers: 241 MB in bfloat16.

    The libraries' own memory is not counted.
    """
    model = tiny_model(
        vocab_size=16032,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.02,
    ).to(dtype)
    own = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    save_model(tmp_path / "model", model, toy_tokenizer())
    del model
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(sizes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] - found["start"] <= 1.2 * own, found
