"""Targets as a recipe writes them, and the shapes that meet them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.account import count_parameters
from stillhouse.errors import RecipeError
from stillhouse.pruning import ARCHITECTURES, Sizes, prune_model, resized_config, sizes_of
from stillhouse.pruning.shapes import (
    Counter,
    counted,
    feasible_shapes,
    limit_of,
    planned_shape,
    shown,
    sizes_to_prune,
)
from stillhouse.recipe import parse_recipe
from stillhouse.recipe.pruning import Amount, SearchRecipe, TargetRecipe, read_amount
from tests import tiny
from tests.teachers.toys import CONFIGS, ToyWindows, tiny_model

SEARCH = SearchRecipe(multiple_of=8, tolerance=0.1)


def shapes(config: Any, search: SearchRecipe = SEARCH, **target: Any) -> list[Sizes]:
    wanted = TargetRecipe(**target)
    counter = Counter(config)
    cost = counted(counter, wanted.key)
    limit = limit_of(wanted, cost(counter.start), search.tolerance)
    return feasible_shapes(config, search, cost, limit)


@pytest.mark.parametrize(
    ("key", "text", "value", "relative"),
    [
        ("params", "60%", 0.6, True),
        ("params", "108M", 108e6, False),
        ("non_embedding_params", 80_000_000, 80e6, False),
        ("bytes", "1.5GB", 1.5e9, False),
        ("memory", "512 MiB", 2**29, False),
        ("decode_latency", "20ms", 0.02, False),
    ],
)
def test_amounts_are_shares_or_numbers_with_units(
    key: Any, text: str, value: float, relative: bool
) -> None:
    found = read_amount(key, text)
    assert found == Amount(pytest.approx(value), relative)
    if not relative:
        assert read_amount(key, shown(key, value)).value == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"target": {}}, "exactly one of params"),
        ({"target": {"params": "60%", "bytes": "1GB"}}, "exactly one of params"),
        ({"target": {"params": "20ms"}}, "is no amount"),
        ({"target": {"params": "0%"}}, "is no amount"),
        ({"target": {"params": "60%"}, "ffn_size": 32}, "a target or sizes, not both"),
    ],
)
def test_targets_that_say_nothing_are_refused(
    tmp_path: Any, student: dict[str, Any], message: str
) -> None:
    raw = tiny.recipe(tmp_path)
    raw["student"] = {"start": "pruned", **student}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw)


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) & set(ARCHITECTURES)))
def test_parameters_of_a_shape_are_those_of_its_model(kind: str) -> None:
    config = CONFIGS[kind]()
    counter, start = Counter(config), sizes_of(config)
    for shape in (
        start,
        Sizes(**{**vars(start), "layers": 2, "ffn_size": 40, "heads": 2, "hidden_size": 24}),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(resized_config(config, shape))
        found = count_parameters(model)
        assert counter.total(shape) == found.total
        assert counter.non_embedding(shape) == found.non_embedding


def test_shapes_meet_the_target_and_can_all_be_pruned() -> None:
    config = CONFIGS["llama"]()
    counter, start = Counter(config), sizes_of(config)
    whole = counter.total(start)
    found = shapes(config, params="65%")
    assert len(found) > 4
    for shape in found:
        assert 0.65 * whole * 0.9 <= counter.total(shape) <= 0.65 * whole
        model = tiny_model("llama")
        cut: Any = sizes_to_prune(start, shape)
        prune_model(model, ToyWindows(count=2), calibration_tokens=32, reconstruct=False, **cut)
        assert count_parameters(model).total == counter.total(shape)


def test_only_the_axes_that_may_be_searched_are_cut() -> None:
    search = SearchRecipe(axes=["ffn_size"], multiple_of=8, tolerance=0.2)
    config = CONFIGS["llama"]()
    start = sizes_of(config)
    assert [
        set(sizes_to_prune(start, shape)) for shape in shapes(config, search, params="80%")
    ] == [{"ffn_size"}]


def test_coarse_alignment_is_preferred_where_it_fits() -> None:
    config = CONFIGS["llama"](hidden_size=64, intermediate_size=1024, num_attention_heads=4)
    search = SearchRecipe(axes=["ffn_size"], tolerance=0.03)
    whole = Counter(config)
    for width in (512, 640, 704, 736):
        exact = whole.total(Sizes(**{**vars(sizes_of(config)), "ffn_size": width}))
        assert shapes(config, search, params=exact)[0].ffn_size == width


def test_tensor_parallel_shapes_divide_evenly() -> None:
    config = CONFIGS["qwen3"](num_attention_heads=8, num_key_value_heads=4)
    search = SearchRecipe(multiple_of=8, tolerance=0.2, tensor_parallel=4)
    found = shapes(config, search, params="60%")
    assert found
    for shape in found:
        assert shape.heads % 4 == 0
        assert shape.ffn_size % 4 == 0
        assert shape.kv_heads % 4 == 0 or 4 % shape.kv_heads == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"params": "5%"}, "below what the axes"),
        ({"params": "100%"}, "not below what the model has"),
        ({"params": "3M"}, "not below what the model has"),
    ],
)
def test_targets_out_of_reach_name_the_nearest_shape(target: dict[str, str], message: str) -> None:
    config = CONFIGS["llama"]()
    with pytest.raises(RecipeError, match=message) as caught:
        shapes(config, **target)
    assert caught.value.where == "student.target.params"
    assert "nearest: " in str(caught.value.fix)


def test_a_gap_between_aligned_shapes_names_the_nearest_one() -> None:
    search = SearchRecipe(axes=["layers"], tolerance=0.01)
    with pytest.raises(RecipeError, match="no aligned shape is within") as caught:
        shapes(CONFIGS["llama"](), search, params="80%")
    assert "layers: 2" in str(caught.value.fix)
    assert "tolerance" in str(caught.value.fix)


def test_a_plan_knows_the_size_before_the_search() -> None:
    config = CONFIGS["llama"]()
    counter = Counter(config)
    planned = planned_shape(config, SEARCH, TargetRecipe(params="70%"))
    assert 0.63 <= counter.total(planned) / counter.total(counter.start) <= 0.7
    assert planned_shape(config, SEARCH, TargetRecipe(decode_latency="1ms")) == counter.start
