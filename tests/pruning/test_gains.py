"""If no projection can be refit, the gain of the FFN's output is refit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stillhouse.pruning import width
from stillhouse.pruning.axes import axes_of
from stillhouse.pruning.calibrate import OwnBatches, Streams, calibration_batches, layer_inputs
from stillhouse.pruning.correction import LARGEST_SHARE, channel_gains, scale_ffn_output
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.refit import Ranking
from stillhouse.pruning.sizes import sizes_of
from stillhouse.pruning.width import cut_width
from tests.pruning.test_gates import IDS, family
from tests.teachers.toys import ToyWindows

KINDS = ["gemma2", "gemma3_text", "qwen3_moe"]
WANTED = torch.tensor([0.5, 1.0, 1.5, 2.0])


def rows(noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    wrote_ND = torch.randn(400, len(WANTED))
    return wrote_ND, wrote_ND * (WANTED - 1) + noise * torch.randn(400, len(WANTED))


def gains_of(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    return channel_gains(OwnBatches([], len(rows)), rows, torch.zeros(len(WANTED)))


def test_half_of_the_gains_correction_is_applied() -> None:
    gain_D = gains_of([rows(0.0), rows(0.0, seed=1)])
    assert_close(gain_D, 1 + LARGEST_SHARE * (WANTED - 1))


def test_an_error_that_the_output_does_not_explain_changes_little() -> None:
    wrote_ND, _ = rows(0.0)
    assert_close(gains_of([(wrote_ND, torch.randn(400, 4))]), torch.ones(4), atol=0.1, rtol=0)


def test_gains_that_held_out_rows_contradict_are_not_applied() -> None:
    wrote_ND, lacking_ND = rows(0.0)
    lacking_ND[350:] *= -1
    assert_close(gains_of([(wrote_ND, lacking_ND)]), torch.ones(4))


def test_a_channel_that_is_not_written_keeps_its_gain() -> None:
    wrote_ND, lacking_ND = rows(0.0)
    wrote_ND[:, 2] = 0
    assert gains_of([(wrote_ND, lacking_ND)])[2] == 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_gain_multiplies_what_the_ffn_adds(kind: str) -> None:
    model = family(kind)
    streams = streams_of(model)
    layer, mids = streams.layers[0], streams.start()
    before = streams.after_ffn(layer, mids)
    gain_D = torch.rand(model.config.hidden_size) + 0.5
    scale_ffn_output(layer, streams.axes, gain_D)
    for mid, old, new in zip(mids, before, streams.after_ffn(layer, mids), strict=True):
        assert_close(new, mid + gain_D * (old - mid), atol=1e-5, rtol=1e-4)


def streams_of(model: Any) -> Streams:
    batches = calibration_batches(ToyWindows(), 256, 0)
    inputs = [layer_inputs(model, batch) for batch in batches]
    return Streams(model, axes_of(model.config), batches, inputs, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_layer_is_partly_compensated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains lower the relative error of the residual stream after the dropped layers."""
    with_gains = error_after_a_drop(kind)
    no_gains = lambda *given: torch.ones_like(channel_gains(*given))  # noqa: E731
    monkeypatch.setattr(width, "channel_gains", no_gains)
    assert with_gains < error_after_a_drop(kind)


def repeating(kind: str) -> Any:
    """A model whose layers write nearly the same, so that a gain can replace missing layers."""
    model = family(kind)
    first, *others = model.base_model.layers
    first.self_attn.o_proj.weight.zero_()
    for layer in others:
        layer.load_state_dict(first.state_dict())
    return model


def error_after_a_drop(kind: str) -> float:
    full, model = repeating(kind), repeating(kind)
    sizes = sizes_of(model.config)
    cut_width(
        model,
        axes_of(model.config),
        calibration_batches(ToyWindows(), 256, 0),
        kept_layers=[0],
        before=sizes,
        after=replace(sizes, layers=1),
        hidden_method=None,
        reconstruct=True,
        dtype=torch.float32,
        ranking=Ranking(),
    )
    whole = streams_of(full)
    target = whole.start()
    for index, layer in enumerate(whole.layers):
        target = whole.after_ffn(layer, whole.after_attention(layer, index, target))
    cut = streams_of(model)
    found = cut.after_ffn(cut.layers[0], cut.after_attention(cut.layers[0], 0, cut.start()))
    lost = [
        ((new - old).square().sum(-1) / old.square().mean(-1))[batch.counted_RL].sum()
        for new, old, batch in zip(found, target, cut.batches, strict=True)
    ]
    return float(torch.stack(lost).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_without_reconstruction_gains_are_not_fitted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width, "channel_gains", lambda *_: pytest.fail("fitted"))
    model = family(kind)
    prune_model(model, ToyWindows(), layers=2, ffn_size=24, reconstruct=False)
    assert model(input_ids=IDS % model.config.vocab_size).logits.isfinite().all()
