"""Cutting unused parts loses nothing; any other cut equals the full model with zeroed parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stillhouse.errors import ModelError
from stillhouse.pruning.axes import axes_of
from stillhouse.pruning.calibrate import OwnBatches, calibration_batches
from stillhouse.pruning.experts import best_experts
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.surgery import check_parameters
from tests.pruning.test_gates import FAMILIES, NOT_ROTATED, family, logits
from tests.teachers.toys import ToyWindows, tiny_model

HIDDEN, NARROW = 32, 24
WINDOWS = ToyWindows()


def writers(model: Any) -> list[Tensor]:
    """Weights and biases that write to the residual stream, [..., D, inputs]."""
    found = [model.get_input_embeddings().weight.T]
    for layer in model.base_model.layers:
        mlp = layer.mlp
        down = mlp.experts.down_proj if hasattr(mlp, "experts") else mlp.down_proj.weight
        found += [layer.self_attn.o_proj.weight, down]
        if layer.self_attn.o_proj.bias is not None:
            found.append(layer.self_attn.o_proj.bias[:, None])
    return found


@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_unused_channels_cost_nothing(kind: str, reconstruct: bool) -> None:
    silent = [1, 5, 6, 13, 20, 21, 28, 31]
    models = [family(kind) for _ in range(2)]
    for model in models:
        for weight in writers(model):
            weight[..., silent, :] = 0
    full, model = models
    report = prune_model(model, WINDOWS, hidden_size=NARROW, reconstruct=reconstruct)
    assert report.calibration_kl == pytest.approx(0, abs=1e-5)
    assert_close(logits(model), logits(full), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - NOT_ROTATED))
def test_a_rotation_finds_the_directions_that_are_written_to(kind: str) -> None:
    M_DH = torch.linalg.qr(torch.randn(HIDDEN, NARROW, generator=torch.Generator().manual_seed(1)))[
        0
    ]
    models = [family(kind) for _ in range(2)]
    for model in models:
        head = model.get_output_embeddings().weight
        tied = head is model.get_input_embeddings().weight
        for weight in writers(model):
            weight.copy_(M_DH @ (M_DH.T @ weight))
        assert tied == (head is model.get_input_embeddings().weight)
    full, model = models
    prune_model(model, WINDOWS, hidden_size=NARROW, hidden_method="rotation", reconstruct=False)
    assert_close(logits(model), logits(full), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("sizes", [{"heads": 2}, {"kv_heads": 1}], ids=["heads", "groups"])
def test_pruning_heads_equals_zeroing_their_output(kind: str, sizes: dict[str, Any]) -> None:
    full, model = family(kind), family(kind)
    prune_model(model, WINDOWS, reconstruct=False, **sizes)
    for layer, cut in zip(full.base_model.layers, model.base_model.layers, strict=True):
        # Heads are identified by their query weights.
        queries = layer.self_attn.q_proj.weight.view(4, 8, HIDDEN)
        kept = cut.self_attn.q_proj.weight.view(-1, 8, HIDDEN)
        gone = [h for h in range(4) if not any(torch.equal(queries[h], one) for one in kept)]
        assert len(gone) == 2
        assert ({h // 2 for h in gone} == {0, 1}) == ("heads" in sizes)
        layer.self_attn.o_proj.weight.view(HIDDEN, 4, 8)[:, gone] = 0
    assert_close(logits(model), logits(full))


def test_heads_that_others_can_replace_cost_nothing() -> None:
    def redundant() -> Any:
        model = tiny_model()
        for layer in model.base_model.layers:
            queries = layer.self_attn.q_proj.weight.view(2, 2, 8, HIDDEN)
            queries[:, 1] = queries[:, 0]
        return model

    losses = {}
    for reconstruct in (False, True):
        model = redundant()
        report = prune_model(model, ToyWindows(count=64), heads=2, reconstruct=reconstruct)
        assert report.calibration_kl is not None
        losses[reconstruct] = report.calibration_kl
        assert model.config.num_attention_heads == 2
    assert losses[True] < 1e-4
    assert losses[False] > 0.01


def test_pruning_experts_equals_never_choosing_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full, model = family("qwen3_moe"), family("qwen3_moe")
    prune_model(model, WINDOWS, experts=4, reconstruct=False)
    for layer, cut in zip(full.base_model.layers, model.base_model.layers, strict=True):
        kept = [row.tolist() for row in cut.mlp.gate.weight]
        gone = [e for e, row in enumerate(layer.mlp.gate.weight) if row.tolist() not in kept]
        assert len(gone) == 2
        monkeypatch.setattr(layer.mlp.gate, "forward", masked_router(layer.mlp.gate, gone))
    assert_close(logits(model), logits(full))


def masked_router(router: Any, gone: list[int]) -> Any:
    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.nn.functional.linear(hidden.reshape(-1, HIDDEN), router.weight)
        scores[:, gone] = -torch.inf
        values, chosen = scores.softmax(-1).topk(2, dim=-1)
        return scores, values / values.sum(-1, keepdim=True), chosen

    return forward


def test_experts_are_ranked_by_what_they_add_to_the_residual_stream() -> None:
    model = family("qwen3_moe")
    layer, axes = model.base_model.layers[0], axes_of(model.config)
    mid_ND = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2))
    weight_N = torch.rand(40, generator=torch.Generator().manual_seed(3))
    score = torch.zeros(6)
    for x, weight in zip(layer.post_attention_layernorm(mid_ND), weight_N, strict=True):
        probability = (layer.mlp.gate.weight @ x).softmax(-1)
        values, chosen = probability.topk(2)
        for share, expert in zip(values / values.sum(), chosen.tolist(), strict=True):
            gate, up = (layer.mlp.experts.gate_up_proj[expert] @ x).chunk(2)
            wrote = layer.mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            score[expert] += weight * share * wrote.norm()
    expected = score.topk(3).indices.sort().values
    rows = list(zip(mid_ND.split(16), weight_N.split(16), strict=True))
    found = best_experts(layer, axes, OwnBatches([], 3), rows, 3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_reported_kl_is_that_of_the_model_with_every_axis_cut(kind: str) -> None:
    full, model = family(kind), family(kind)
    windows = ToyWindows(count=4)
    report = prune_model(model, windows, layers=2, hidden_size=24, heads=2, ffn_size=24)
    batch = calibration_batches(windows, 10_000, 0)[0]
    inputs = {"input_ids": batch.input_ids_RL, "position_ids": batch.position_ids_RL}
    p, q = (m(**inputs, use_cache=False).logits.double().log_softmax(-1) for m in (full, model))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert report.calibration_kl == pytest.approx(kl, rel=1e-3)
    assert report.changed.keys() >= {"layers", "hidden_size", "heads", "ffn_size"}


def test_the_refit_makes_narrow_models_better() -> None:
    heldout = ToyWindows(count=32, seed=5).ids
    p = logits(family("llama"), heldout).log_softmax(-1)
    for sizes in ({"hidden_size": 24}, {"hidden_size": 24, "hidden_method": "rotation"}):
        loss = {}
        for reconstruct in (False, True):
            model = family("llama")
            prune_model(model, ToyWindows(count=128), reconstruct=reconstruct, **sizes)
            q = logits(model, heldout).log_softmax(-1)
            loss[reconstruct] = (p.exp() * (p - q)).sum(-1).mean().item()
        assert loss[True] < loss[False]


def test_a_layer_with_parameters_that_no_axis_declares_is_rejected() -> None:
    model = tiny_model()
    model.base_model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="layer 1 has parameters that pruning does not support"):
        check_parameters(model, axes_of(model.config))


def test_experts_in_some_layers_only_are_rejected() -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(ModelError, match="have plain FFNs in some layers"):
        prune_model(model, WINDOWS, layers=2)
