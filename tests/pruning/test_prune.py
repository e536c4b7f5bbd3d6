"""Every pruned model is homogeneous, loadable, and close to the full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stillhouse.errors import DataError, ModelError, RecipeError
from stillhouse.pruning.axes import ARCHITECTURES, axes_of
from stillhouse.pruning.calibrate import (
    add_ffn,
    after_attention,
    calibration_batches,
    ffn_activations,
    layer_inputs,
    run_layer,
)
from stillhouse.pruning.depth import choose_layers
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.sizes import check_sizes
from stillhouse.pruning.surgery import check_saved, keep_layers, own_config
from tests.teachers.toys import VOCABULARY, ToyWindows, tiny_model

IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(9))
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3"]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def kl(full: Any, other: Any, ids: Tensor, positions: Tensor) -> float:
    """KL(full, other) from all logits. With a cache, transformers would not separate documents."""
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    p, q = (model(**inputs).logits.double().log_softmax(-1) for model in (full, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def without(model: Any, *dropped: int) -> Any:
    made = tiny_model(model.config.model_type, num_hidden_layers=model.config.num_hidden_layers)
    own_config(made)
    keep_layers(made, [i for i in range(model.config.num_hidden_layers) if i not in dropped])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_layer_compute_what_the_layer_computes(kind: str) -> None:
    model = tiny_model(kind)
    axes = axes_of(model.config)
    batch = calibration_batches(ToyWindows(), 64, 0)[0]
    inputs = layer_inputs(model, batch)
    expected = model.base_model(
        input_ids=batch.input_ids_RL,
        position_ids=batch.position_ids_RL,
        output_hidden_states=True,
        use_cache=False,
    )
    hidden = inputs.hidden_RLD
    for layer, extras in zip(model.base_model.layers, inputs.extras, strict=True):
        mid = after_attention(layer, axes, hidden, extras)
        hidden = run_layer(layer, hidden, extras)
        assert_close(add_ffn(layer, axes, mid, ffn_activations(layer, axes, mid)), hidden)
    assert_close(model.base_model.norm(hidden), expected.last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_to_the_same_sizes_keeps_the_logits(kind: str) -> None:
    model = tiny_model(kind)
    prune_model(model, ToyWindows(), ffn_size=64, layers=3)
    assert_close(logits(model), logits(tiny_model(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_saved_loaded_and_generates(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    report = prune_model(model, ToyWindows(), ffn_size=40, layers=2)
    assert (report.ffn_size, report.layers) == ((64, 40), (3, 2))
    assert report.calibration_kl is not None
    assert report.calibration_kl > 0
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path, IDS)
    assert model.config.intermediate_size == 40
    assert {layer.mlp.down_proj.weight.shape for layer in model.base_model.layers} == {(32, 40)}
    cached = model.generate(IDS[:, :6], max_new_tokens=6, do_sample=False, use_cache=True)
    plain = model.generate(IDS[:, :6], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "qwen3_moe", "llama"])
def test_dropped_layers_without_compensation_are_noted(kind: str) -> None:
    notes = {
        layers: prune_model(tiny_model(kind), ToyWindows(), layers=layers, ffn_size=24).notes
        for layers in (2, 3)
    }
    expected = kind != "llama"
    assert any("compensates for dropped layers" in note for note in notes[2]) == expected
    assert not any("compensates for dropped layers" in note for note in notes[3])


def test_mlp_biases_are_cut_too(tmp_path: Path) -> None:
    model = tiny_model("llama", mlp_bias=True)
    for layer in model.base_model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.bias.normal_()
    prune_model(model, ToyWindows(), ffn_size=40)
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path, IDS)


def test_a_checkpoint_that_differs_is_detected(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.base_model.layers[0].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(ModelError, match="does not load as the same model"):
        check_saved(model, tmp_path, IDS)


def test_per_layer_settings_follow_the_kept_layers() -> None:
    model = tiny_model("smollm3", num_hidden_layers=6, no_rope_layers=[1, 0, 1, 1, 0, 1])
    keep_layers(model, [1, 2, 4])
    assert model.config.no_rope_layers == [0, 1, 0]
    assert [layer.self_attn.use_rope for layer in model.base_model.layers] == [0, 1, 0]
    gemma = tiny_model("gemma2", num_hidden_layers=4)
    assert gemma.config.layer_types[1:] == ["full_attention", "sliding_attention", "full_attention"]
    keep_layers(gemma, [1, 3])
    assert gemma.config.layer_types == ["full_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in gemma.base_model.layers] == [0, 1]


def test_leave_one_out_is_the_kl_without_each_layer() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    batches = calibration_batches(ToyWindows(count=6), 192, 0)
    choice = choose_layers(model, batches, keep=4)
    ids = torch.cat([batch.input_ids_RL for batch in batches])
    positions = torch.cat([batch.position_ids_RL for batch in batches])
    expected = [kl(model, without(model, index), ids, positions) for index in range(4)]
    assert choice.single_kl == pytest.approx(expected, rel=1e-3)
    assert choice.kept == (0, 1, 2, 3)


def test_the_cheapest_layers_are_removed_one_by_one() -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    batches = calibration_batches(ToyWindows(count=6), 192, 0)
    choice = choose_layers(model, batches, keep=3)
    ids = torch.cat([batch.input_ids_RL for batch in batches])
    positions = torch.cat([batch.position_ids_RL for batch in batches])
    first = min(range(5), key=lambda i: kl(model, without(model, i), ids, positions))
    others = [i for i in range(5) if i != first]
    second = min(others, key=lambda i: kl(model, without(model, first, i), ids, positions))
    assert [index for index, _ in choice.dropped] == [first, second]
    both = kl(model, without(model, first, second), ids, positions)
    assert choice.dropped[1][1] == pytest.approx(both, rel=1e-3)


def redundant_model() -> Any:
    """A model whose neurons 40 to 63 compute what neurons 0 to 23 compute, in every layer."""
    model = tiny_model()
    for layer in model.base_model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[40:] = linear.weight[:24]
    return model


def test_neurons_that_others_can_replace_cost_nothing() -> None:
    windows = ToyWindows(count=64)
    heldout = ToyWindows(count=8, seed=5)
    positions = windows.positions.expand(8, -1)
    distance = {}
    for reconstruct in (False, True):
        model = redundant_model()
        prune_model(model, windows, ffn_size=40, reconstruct=reconstruct)
        distance[reconstruct] = kl(redundant_model(), model, heldout.ids, positions)
    assert distance[True] < 1e-3
    assert distance[False] > 50 * distance[True]


def test_the_refit_compensates_for_a_dropped_layer() -> None:
    windows = ToyWindows(count=64)
    positions = windows.positions.expand(64, -1)
    distance = {}
    for reconstruct in (False, True):
        model = tiny_model()
        prune_model(model, windows, layers=2, reconstruct=reconstruct)
        distance[reconstruct] = kl(tiny_model(), model, windows.ids, positions)
    assert distance[True] < distance[False]


def test_calibration_kl_is_that_of_the_pruned_model() -> None:
    windows = ToyWindows(count=4)
    model = tiny_model()
    report = prune_model(model, windows, ffn_size=40, layers=2)
    expected = kl(tiny_model(), model, windows.ids, windows.positions.expand(4, -1))
    assert report.calibration_kl == pytest.approx(expected, rel=1e-3)


def test_padding_does_not_affect_the_pruned_model() -> None:
    clean, padded = ToyWindows(padding=8), ToyWindows(padding=8)
    padded.ids[:, -8:] = 0
    pruned = []
    for windows in (clean, padded):
        model = tiny_model()
        prune_model(model, windows, ffn_size=40)
        pruned.append(logits(model))
    assert_close(*pruned)


def test_fewer_tokens_than_requested_are_noted() -> None:
    report = prune_model(tiny_model(), ToyWindows(count=2), ffn_size=32)
    assert report.calibration_tokens == 64
    assert "all 64 training tokens" in report.notes[0]
    assert prune_model(tiny_model(), ToyWindows(), ffn_size=32, calibration_tokens=64).notes == ()
    padded = ToyWindows(padding=20)
    report = prune_model(tiny_model(), padded, ffn_size=32, calibration_tokens=64)
    assert "calibrated on 24 training tokens, not 64: the rest" in report.notes[0]


def test_the_same_seed_gives_the_same_model() -> None:
    models = [tiny_model() for _ in range(2)]
    for model in models:
        prune_model(model, ToyWindows(), ffn_size=40, calibration_tokens=256, seed=3)
    assert torch.equal(*[logits(model) for model in models])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn_size": 65}, "ffn_size: 65 is not possible: the teacher has 64"),
        ({"layers": 4}, "layers: 4 is not possible: the teacher has 3"),
        ({"layers": 0}, "layers: 0 is not possible"),
        ({}, "needs a size"),
    ],
)
def test_the_error_for_an_impossible_size_states_the_range(
    sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        check_sizes(tiny_model().config, sizes)
    assert "1 to" in str(caught.value)


def test_other_architectures_are_rejected_with_the_list() -> None:
    with pytest.raises(ModelError, match="'cohere' cannot be pruned") as caught:
        prune_model(tiny_model("cohere"), ToyWindows(), ffn_size=40)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="no training text"):
        prune_model(tiny_model(), ToyWindows(count=0), ffn_size=40)
