"""An ONNX classifier in onnxruntime agrees with its checkpoint, with and without padding."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from stillhouse.errors import ModelError
from stillhouse.export import onnx_export, replay_onnx
from stillhouse.export.onnx_export import FILE, OnnxReplay, export_onnx

onnxruntime = pytest.importorskip("onnxruntime")

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 3,
    "pad_token_id": 0,
}
BATCHES = [[[5, 6, 7], [8]], [[9, 10, 11, 12, 13, 14, 15, 16, 17]], [[1, 2], [3, 4], [5, 99]]]


def model(kind: str) -> Any:
    torch.manual_seed(0)
    match kind:
        case "bert":
            return BertForSequenceClassification(BertConfig(**SHAPE, initializer_range=0.3)).eval()
        case "llama":
            llama = LlamaConfig(**SHAPE, num_key_value_heads=2, initializer_range=0.3)
            return LlamaForSequenceClassification(llama).eval()
    modern = ModernBertConfig(
        **SHAPE,
        initializer_range=0.3,
        layer_types=["full_attention"] * 2,
        classifier_pooling="mean",
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    return ModernBertForSequenceClassification(modern).eval()


@torch.no_grad()
def alone(classifier: nn.Module) -> Tensor:
    """The logits of each text in a batch of its own, without padding."""
    rows = [row for batch in BATCHES for row in batch]
    return torch.cat([classifier(input_ids=torch.tensor([row])).logits for row in rows])


def export(classifier: Any, out: Path, form: str = "onnx", **changes: Any) -> OnnxReplay:
    expected_NC = changes.pop("expected_NC", None)
    expected_NC = alone(classifier).softmax(-1) if expected_NC is None else expected_NC
    return export_onnx(
        classifier,
        BATCHES,
        0,
        expected_NC,
        out,
        form=form,
        source=out,
        read=plain_logits,
        **changes,
    )


def plain_logits(model: Any, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    logits_BC: Tensor = model(input_ids=ids_BL, attention_mask=mask_BL).logits
    return logits_BC.float()


def test_the_replay_does_not_import_stillhouse_or_torch() -> None:
    script = ast.parse(Path(replay_onnx.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(script) if isinstance(node, ast.ImportFrom)}
    names |= {
        name.name
        for node in ast.walk(script)
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert "onnxruntime" in names
    assert not any(str(name).startswith(("stillhouse", "torch")) for name in names)


@pytest.mark.run
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_float32_file_agrees_with_the_checkpoint_with_and_without_padding(
    kind: str, tmp_path: Path
) -> None:
    result = export(model(kind), tmp_path)
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1
    assert result.texts == 6
    assert result.texts_per_s > 0
    assert result.bytes == (tmp_path / FILE).stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "one file holds everything"


@pytest.mark.run
@pytest.mark.fresh_process
def test_an_int8_file_is_smaller_and_close_in_a_fresh_process(tmp_path: Path) -> None:
    classifier = model("modernbert")
    whole = export(classifier, tmp_path / "whole")
    rounded = export(classifier, tmp_path / "rounded", "onnx-int8")
    assert rounded.bytes < whole.bytes
    assert 0 < rounded.kl < rounded.kl_limit == 0.1
    assert [path.name for path in (tmp_path / "rounded").iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("shift", "limit", "message"), [(1, None, "at most 1e-05"), (0, 1e-20, "at most 1e-20")]
)
def test_a_file_with_different_probabilities_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shift: int,
    limit: float | None,
    message: str,
) -> None:
    logits_NC = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    said_NC = (logits_NC.roll(shift, dims=-1) + 1e-4 * torch.arange(3)).softmax(-1)
    answer = {"logits": logits_NC, "seconds": 1.0}
    monkeypatch.setattr(onnx_export, "run_script", lambda *_, **__: answer)
    for step in ("_write", "_round"):
        monkeypatch.setattr(onnx_export, step, lambda *_: None)
    classifier = nn.Linear(1, 1)
    with pytest.raises(ModelError, match=message) as caught:
        export(classifier, tmp_path, expected_NC=said_NC, kl_limit=limit)
    assert "only safetensors" in str(caught.value.fix)
    with pytest.raises(ModelError) as caught:
        export(classifier, tmp_path, "onnx-int8", expected_NC=said_NC, kl_limit=1e-20)
    assert "export onnx, or raise export.kl_limit" in str(caught.value.fix)


class Odd(nn.Module):
    """A model whose control flow depends on its inputs, which a graph cannot represent."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if int(input_ids.sum()) % 2:
            return SimpleNamespace(logits=input_ids[:, :3].float())
        return SimpleNamespace(logits=attention_mask[:, :3].float())


@pytest.mark.run
def test_a_model_that_torch_cannot_export_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="torch cannot export Odd") as caught:
        export(Odd(), tmp_path, expected_NC=torch.zeros(6, 3))
    assert "safetensors" in str(caught.value.fix)


def test_the_error_for_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="onnxruntime, which is not installed") as caught:
        export(model("bert"), tmp_path)
    assert "stillhouse[onnx]" in str(caught.value.fix)
