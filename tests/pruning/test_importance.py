"""Importance scores: gradients agree with finite differences, and layer scores with the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import RecipeError
from stillhouse.pruning.axes import axes_of
from stillhouse.pruning.calibrate import Batch, OwnBatches, calibration_batches
from stillhouse.pruning.depth import choose_layers, layer_scores
from stillhouse.pruning.gradients import Fisher, Part, mask_fisher
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.pruning_config import PruningMethod
from tests import tiny
from tests.teachers.toys import ToyWindows, tiny_model

KINDS = ("neurons", "heads", "channels", "layers")


def one_batch(count: int = 4) -> Batch:
    (batch,) = calibration_batches(ToyWindows(count=count), 10**6, 0, together=10**6)
    return batch


def logits(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model(
        input_ids=batch.input_ids_RL, position_ids=batch.position_ids_RL, use_cache=False
    ).logits
    return found.double().log_softmax(-1)


def fisher(model: Any, batch: Batch, kinds: Any = KINDS, seed: int = 0) -> Fisher:
    axes = axes_of(model.config)
    return mask_fisher(model, axes, OwnBatches([batch], 1), kinds, seed=seed, dtype=torch.float32)


def draws(model: Any, batch: Batch, seed: int) -> Tensor:
    """The labels that `mask_fisher` draws for its first batch."""
    rows = logits(model, batch).float().flatten(0, 1).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(rows, 1, generator=generator).view(batch.input_ids_RL.shape)


def scaled(model: Any, kind: str, layer: int, index: int, factor: float) -> None:
    """Multiplies the output of one part by a factor, in the weights that write it."""
    config, block = model.config, model.base_model.layers[layer]
    if kind == "neurons":
        block.mlp.down_proj.weight[:, index] *= factor
    elif kind == "heads":
        block.self_attn.o_proj.weight[:, index * 8 : (index + 1) * 8] *= factor
    else:
        assert not config.tie_word_embeddings, "the head must not change with the embeddings"
        model.base_model.embed_tokens.weight[:, index] *= factor
        for each in model.base_model.layers:
            each.mlp.down_proj.weight[index] *= factor
            each.self_attn.o_proj.weight[index] *= factor


@pytest.mark.parametrize(
    ("kind", "layer", "index"),
    [("neurons", 0, 5), ("neurons", 2, 40), ("heads", 1, 3), ("channels", 0, 7)],
)
def test_mask_gradients_agree_with_finite_differences(kind: Part, layer: int, index: int) -> None:
    batch, step = one_batch(), 1e-3
    drawn = draws(tiny_model(), batch, 0)

    def window_losses(factor: float) -> Tensor:
        model = tiny_model()
        scaled(model, kind, layer, index, factor)
        found = logits(model, batch).gather(-1, drawn[..., None])[..., 0]
        return -found.sum(-1)

    slope = (window_losses(1 + step) - window_losses(1 - step)) / (2 * step)
    expected = (slope.square().sum() / drawn.numel()).item()
    found = fisher(tiny_model(), batch)
    values = found[kind][0 if kind == "channels" else layer]
    assert values[index].item() == pytest.approx(expected, rel=2e-2)


@pytest.mark.run
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "smollm3"])
def test_half_the_fisher_information_is_the_curvature_of_the_kl(kind: str) -> None:
    batch, step = one_batch(48), 0.05
    full = logits(tiny_model(kind), batch)
    expected = 0.0
    for layer in range(3):
        for index in range(0, 64, 4):
            model = tiny_model(kind)
            scaled(model, "neurons", layer, index, 1 - step)
            expected += (full.exp() * (full - logits(model, batch))).sum(-1).mean().item() / step**2
    found = fisher(tiny_model(kind), batch, ["neurons"])["neurons"]
    half = sum(float(values[::4].sum()) for values in found) / 2
    assert half == pytest.approx(expected, rel=0.25)


def test_a_layers_mask_scales_what_the_layer_adds() -> None:
    """A layer that adds nothing to the residual stream has no gradient."""
    model = tiny_model()
    model.base_model.layers[1].mlp.down_proj.weight.zero_()
    model.base_model.layers[1].self_attn.o_proj.weight.zero_()
    values = torch.cat(fisher(model, one_batch(), ["layers"])["layers"])
    assert values[1].item() == 0
    assert values[0] > 0
    assert values[2] > 0


def test_layer_scores_agree_with_the_papers_formulas() -> None:
    model, batch = tiny_model(), one_batch()
    states = model.base_model(
        input_ids=batch.input_ids_RL,
        position_ids=batch.position_ids_RL,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    before, after = states[0].flatten(0, 1).double(), states[1].flatten(0, 1).double()
    influence = 1 - (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    ratio = after.norm(dim=-1) / before.norm(dim=-1)
    found = (
        layer_scores(model, [batch], "block_influence"),
        layer_scores(model, [batch], "norm_ratio"),
    )
    assert found[0][0] == pytest.approx(influence.mean().item(), rel=1e-5)
    assert found[1][0] == pytest.approx(ratio.mean().item(), rel=1e-5)


def test_layers_with_the_lowest_scores_are_removed_and_their_kl_is_measured() -> None:
    model = tiny_model(num_hidden_layers=4)
    batches = [one_batch()]
    chosen = choose_layers(model, batches, 2, scores=[3.0, 1.0, 2.0, 4.0])
    assert chosen.kept == (0, 3)
    assert [index for index, _ in chosen.dropped] == [1, 2]
    tried = choose_layers(model, batches, 4)
    assert chosen.dropped[0][1] == pytest.approx(tried.single_kl[1], rel=1e-4)


@pytest.mark.parametrize("by", ["kl", "block_influence", "norm_ratio", "gradients"])
def test_every_depth_importance_drops_a_layer(by: Any) -> None:
    report = prune_model(
        tiny_model(), ToyWindows(), layers=2, method=PruningMethod(depth_importance=by)
    )
    assert report.layers == (3, 2)
    assert len(report.dropped_layers) == 1


METHODS = [
    PruningMethod(importance="activations"),
    PruningMethod(importance="activations", aggregation="mean"),
    PruningMethod(importance="gradients"),
]


@pytest.mark.parametrize("method", METHODS, ids=["l2", "mean", "gradients"])
@pytest.mark.parametrize("reconstruct", [True, False])
def test_every_method_prunes_several_axes_together(
    method: PruningMethod, reconstruct: bool
) -> None:
    model = tiny_model()
    prune_model(
        model,
        ToyWindows(),
        ffn_size=40,
        heads=2,
        hidden_size=24,
        reconstruct=reconstruct,
        method=method,
    )
    assert model.config.intermediate_size == 40
    assert logits(model, one_batch()).isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=["l2", "mean", "gradients"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 2},
        {"ffn_size": 40},
        {"heads": 2},
        {"kv_heads": 1},
        {"hidden_size": 24},
        {"hidden_size": 24, "hidden_method": "rotation"},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_every_method_prunes_each_axis_alone(method: PruningMethod, sizes: dict[str, Any]) -> None:
    model = tiny_model()
    full = logits(tiny_model(), one_batch())
    report = prune_model(model, ToyWindows(), method=method, **sizes)
    found = logits(model, one_batch())
    assert set(report.changed) == set(sizes) - {"hidden_method"} | (
        {"heads"} if "kv_heads" in sizes else set()
    )
    # Nothing but that axis is damaged.
    assert 0 < (full.exp() * (full - found)).sum(-1).mean() < 2.0


@pytest.mark.parametrize("method", METHODS, ids=["l2", "mean", "gradients"])
def test_neurons_that_write_nothing_are_removed_first(method: PruningMethod) -> None:
    model = tiny_model()
    for layer in model.base_model.layers:
        layer.mlp.down_proj.weight[:, ::2] = 0
    full = logits(model, one_batch())
    prune_model(model, ToyWindows(), ffn_size=32, reconstruct=False, method=method)
    assert_close(logits(model, one_batch()), full)


@pytest.mark.parametrize("method", METHODS[:2], ids=["l2", "mean"])
def test_a_refit_keeps_the_same_neurons_of_experts_and_changes_their_output(
    method: PruningMethod,
) -> None:
    kept = []
    for reconstruct in (True, False):
        model = tiny_model("qwen3_moe")
        prune_model(model, ToyWindows(), ffn_size=16, reconstruct=reconstruct, method=method)
        kept.append(model.base_model.layers[0].mlp.experts)
    assert torch.equal(kept[0].gate_up_proj, kept[1].gate_up_proj)
    assert not torch.allclose(kept[0].down_proj, kept[1].down_proj)


def test_the_aggregation_decides_which_neurons_of_experts_are_kept() -> None:
    kept = []
    for method in METHODS[:2]:
        model = tiny_model("qwen3_moe")
        prune_model(model, ToyWindows(), ffn_size=16, reconstruct=False, method=method)
        kept.append(model.base_model.layers[0].mlp.experts.gate_up_proj)
    assert not torch.equal(*kept)


def test_experts_cannot_be_ranked_by_gradients() -> None:
    with pytest.raises(RecipeError, match="cannot rank experts"):
        prune_model(
            tiny_model("qwen3_moe"),
            ToyWindows(),
            experts=4,
            method=PruningMethod(importance="gradients"),
        )


def test_neurons_of_experts_cannot_be_ranked_by_gradients() -> None:
    with pytest.raises(RecipeError, match="neurons of experts"):
        prune_model(
            tiny_model("qwen3_moe"),
            ToyWindows(),
            ffn_size=16,
            method=PruningMethod(importance="gradients"),
        )


def test_an_aggregation_that_has_no_effect_is_rejected(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    raw["student"] = {"start": "pruned", "ffn_size": 32, "aggregation": "mean"}
    with pytest.raises(RecipeError, match="has no effect without importance: activations"):
        parse_recipe(raw)
