"""Pruning a large model takes little more memory than the model's size on disk."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from stillhouse.errors import RunError
from stillhouse.pruning import hidden, offload
from stillhouse.pruning.offload import is_offloaded, load_offloaded, release, released_after_use
from stillhouse.pruning.offload import save_model as write_model
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.pruning_config import PruningMethod
from stillhouse.pruning.surgery import check_saved
from stillhouse.signals import lm_head as head_module
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.load_model import load_model
from tests.teachers.toys import ToyWindows, save_model, tiny_model, toy_tokenizer

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as on Linux")
IDS = ToyWindows().ids[:2]


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the scratch files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_an_offloaded_layer_computes_the_same(scratch: Path) -> None:
    model = tiny_model()
    expected = logits(model)
    for layer in model.base_model.layers:
        assert not is_offloaded(layer)
        offload.offload(layer)
        assert is_offloaded(layer)
        release(layer)
    assert torch.equal(logits(model), expected)
    layers = model.base_model.layers
    assert len(list(scratch.iterdir())) == len(list(layers.parameters()))


def test_changes_to_weights_are_kept_when_they_are_released() -> None:
    model = tiny_model()
    layer = model.base_model.layers[0]
    offload.offload(layer)
    layer.mlp.down_proj.weight.mul_(2)
    expected = logits(model)
    release(layer)
    assert torch.equal(logits(model), expected)


def test_released_weights_keep_their_values_while_something_refers_to_them() -> None:
    model = tiny_model()
    offload.offload(model)
    head = lm_head(model).weight_VD
    rows_VD, expected_VD = head[:20], head[:20].clone()
    release(model)
    assert torch.equal(rows_VD, expected_VD)
    model.get_output_embeddings().weight = nn.Parameter(torch.zeros(1))
    del model
    gc.collect()
    assert torch.equal(rows_VD, expected_VD)
    assert torch.equal(head[:20], expected_VD)


def test_tied_weights_stay_tied() -> None:
    model = tiny_model(tie_word_embeddings=True)
    offload.offload(model)
    release(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_scratch_file_is_deleted_with_its_parameter(scratch: Path) -> None:
    model = tiny_model()
    offload.offload(model)
    assert list(scratch.iterdir())
    del model
    gc.collect()
    assert not list(scratch.iterdir())


def test_weights_outlive_their_deleted_scratch_files(scratch: Path) -> None:
    model = tiny_model()
    expected = logits(model)
    offload.offload(model)
    for file in scratch.iterdir():
        file.unlink()
    release(model)
    assert torch.equal(logits(model), expected)
    assert not list(scratch.iterdir())


def test_a_model_in_memory_may_have_its_layers_under_any_name(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    expected = logits(model, IDS % 64)
    with released_after_use(model):
        assert torch.equal(logits(model, IDS % 64), expected)
    write_model(model, tmp_path)
    check_saved(model, tmp_path, torch.arange(8)[None])


def test_a_scratch_folder_that_cannot_be_written_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(RunError, match="missing"):
        offload.offload(tiny_model())


@pytest.mark.run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"ffn_size": 40},
        {"ffn_size": 40, "local_tokens": 512},
        {"layers": 2},
        {"layers": 2, "ffn_size": 40, "method": PruningMethod(depth_importance="gradients")},
        {"heads": 2, "hidden_size": 24},
        {"heads": 2, "hidden_size": 24, "method": PruningMethod(importance="gradients")},
        {"hidden_size": 24, "hidden_method": "rotation"},
        {"ffn_size": 40, "kept_ids": range(60)},
    ],
    ids=str,
)
def test_an_offloaded_model_is_pruned_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: dict[str, Any]
) -> None:
    save_model(tmp_path, tiny_model().to(dtype))
    usual = load_model(tmp_path, dtype=torch.float32)
    prune_model(usual, ToyWindows(), **sizes)
    monkeypatch.setattr(offload, "LARGE_BYTES", 0)
    large = load_offloaded(tmp_path)
    assert all(is_offloaded(module) for module in large.modules() if own_parameters(module))
    assert {parameter.dtype for parameter in large.parameters()} == {torch.float32}
    prune_model(large, ToyWindows(), **sizes)
    ids = IDS % len(usual.get_input_embeddings().weight)
    with released_after_use(large):
        assert torch.equal(logits(large, ids), logits(usual, ids))
    for name, value in usual.named_parameters():
        assert torch.equal(dict(large.named_parameters())[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_written_layer_by_layer_equals_the_one_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "usual")
    monkeypatch.setattr(offload, "LARGE_BYTES", 0)
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


def test_the_head_is_processed_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_VD = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    centered_VD = weight_VD - weight_VD.mean(0)
    monkeypatch.setattr(hidden, "BLOCK", 7)
    assert_close(hidden.head_gram(weight_VD), centered_VD.T @ centered_VD)
    whole, cut = tiny_model(), tiny_model()
    prune_model(cut, ToyWindows(), hidden_size=24)
    monkeypatch.undo()
    prune_model(whole, ToyWindows(), hidden_size=24)
    assert_close(logits(cut), logits(whole), rtol=1e-4, atol=1e-4)


def test_the_gram_matrix_of_the_head_is_computed_only_if_the_hidden_size_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(hidden, "head_gram", refuse)
    prune_model(tiny_model(), ToyWindows(), ffn_size=40)


def test_logits_over_a_large_vocabulary_are_computed_for_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, rows_ND = lm_head(tiny_model()), torch.randn(20, 32)
    expected = head_module.summed_kl(head, rows_ND, [rows_ND + 0.1])
    asked: list[int] = []
    real = head_module.head_logits

    def noted(head: Any, rows_nD: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows_nD))
        return real(head, rows_nD)

    monkeypatch.setattr(head_module, "head_logits", noted)
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 3 * len(head.weight_VD))
    assert head_module.summed_kl(head, rows_ND, [rows_ND + 0.1]) == pytest.approx(
        expected, rel=1e-4
    )
    assert max(asked) == 3
    assert sum(asked) == 2 * 20


PROGRAM = """
import json, sys
from pathlib import Path
from stillhouse.hardware import peak_memory_bytes
from stillhouse.pruning import offload
from stillhouse.students.student_config import PrunedStudent
from stillhouse.students.build_student import build_student
from stillhouse.teachers.model_source import resolve_model
from tests.teachers.toys import ToyWindows, tiny_model
offload.LARGE_BYTES = 0
folder = Path(sys.argv[1])
# The memory of Python, the libraries, and a small model, which is not counted.
from tests.pruning.test_offload import warm_up
warm_up(folder)
start = peak_memory_bytes()
section = PrunedStudent.model_validate({"start": "pruned", **json.loads(sys.argv[2])})
build_student(section, teacher=resolve_model("model", base=folder), windows=ToyWindows(count=64),
              heldout=ToyWindows(count=8, seed=1), seed=0, base=folder, out=folder / "student")
print(json.dumps({"start": start, "peak": peak_memory_bytes()}))
"""


def warm_up(folder: Path) -> None:
    save_model(folder / "small")
    prune_model(load_offloaded(folder / "small"), ToyWindows(), ffn_size=40)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [{"ffn_size": 1216}, {"layers": 29, "heads": 8}, {"hidden_size": 448}]
)
def test_peak_memory_is_at_most_1_2_times_the_stored_model(
    tmp_path: Path, dtype: torch.dtype, sizes: dict[str, Any]
) -> None:
    """The model is Llama 3 8B with an eighth of the width and vocabulary: 241 MB in bfloat16.

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
