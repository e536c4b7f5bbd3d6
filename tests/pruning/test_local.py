"""Block-wise local distillation reduces the residual stream's error, and never increases it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from stillhouse.pruning import local_distillation as local
from stillhouse.pruning.prune import prune_model
from tests.teachers.toys import ToyWindows, tiny_model


def kl(full: Any, other: Any, windows: ToyWindows) -> float:
    positions = windows.positions.expand(len(windows), -1)
    inputs = {"input_ids": windows.ids, "position_ids": positions, "use_cache": False}
    p, q = (model(**inputs).logits.double().log_softmax(-1) for model in (full, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of the toy text, so that one can be held out."""
    monkeypatch.setattr("stillhouse.pruning.calibrate.BATCH_TOKENS", 256)
    monkeypatch.setattr("stillhouse.pruning.prune.calibration_batches", several)


def several(
    windows: Any, tokens: int, seed: int, device: Any = "cpu", together: int = 256, **more: Any
) -> Any:
    from stillhouse.pruning.calibrate import calibration_batches

    return calibration_batches(windows, tokens, seed, device, min(together, 256), **more)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_local_distillation_lowers_the_kl_on_unseen_text(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LEARNING_RATE", 1e-3)
    heldout, distance = ToyWindows(count=16, seed=5), {}
    for tokens in (0, 6000):
        model = tiny_model(kind)
        report = prune_model(model, ToyWindows(count=48), ffn_size=16, local_tokens=tokens)
        distance[tokens] = kl(tiny_model(kind), model, heldout)
        assert len(report.local_gains) == (3 if tokens else 0)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert max(report.local_gains) > 0.02
    assert distance[6000] < distance[0]


def test_a_layer_that_training_makes_worse_gets_its_weights_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "LEARNING_RATE", 1e4)
    pruned = []
    for tokens in (0, 512):
        model = tiny_model()
        report = prune_model(model, ToyWindows(count=32), ffn_size=32, local_tokens=tokens)
        pruned.append(dict(model.named_parameters()))
    assert report.local_gains == (0.0, 0.0, 0.0)
    for name, values in pruned[0].items():
        assert_close(pruned[1][name], values, msg=name)


def test_local_distillation_works_with_several_axes_at_once() -> None:
    model = tiny_model()
    report = prune_model(
        model, ToyWindows(), ffn_size=32, layers=2, heads=2, hidden_size=24, local_tokens=512
    )
    assert len(report.local_gains) == 2
    assert torch.isfinite(model(input_ids=ToyWindows().ids[:2]).logits).all()
