"""Targets in recipe syntax, and the shapes that meet them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.account import count_parameters
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import RecipeError
from stillhouse.pruning.axes import ARCHITECTURES
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.pruning_config import (
    Amount,
    SearchRecipe,
    TargetRecipe,
    VocabularyFile,
    read_amount,
)
from stillhouse.pruning.shapes import (
    Counter,
    Limit,
    counted,
    feasible_shapes,
    limit_of,
    planned_shape,
    possible_shapes,
    shown,
    sizes_to_prune,
)
from stillhouse.pruning.sizes import Sizes, resized_config, sizes_of
from stillhouse.search import shape_costs as costs
from stillhouse.search.block_timing import Timing
from stillhouse.search.trial_log import Journal
from stillhouse.students.build_student import planned_config
from stillhouse.students.student_config import PrunedStudent
from tests import tiny
from tests.teachers.toys import CONFIGS, ToyWindows, tiny_model

SEARCH = SearchRecipe(multiple_of=8, tolerance=0.1)


def shapes(config: Any, search: SearchRecipe = SEARCH, **target: Any) -> list[Sizes]:
    wanted = TargetRecipe(**target)
    counter = Counter(config)
    cost = counted(counter, wanted.key, 2)
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
    assert found.value == pytest.approx(value)
    assert found == Amount(found.value, relative)
    if not relative:
        assert read_amount(key, shown(key, value)).value == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"target": {}}, "exactly one of params"),
        ({"target": {"params": "60%", "bytes": "1GB"}}, "exactly one of params"),
        ({"target": {"params": "20ms"}}, "is not a valid amount"),
        ({"target": {"params": "0%"}}, "is not a valid amount"),
        ({"target": {"params": "60%"}, "ffn_size": 32}, "a target or sizes, not both"),
    ],
)
def test_invalid_targets_are_rejected(tmp_path: Any, student: dict[str, Any], message: str) -> None:
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
        replace(start, experts=start.experts and start.experts - 1),
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


def test_only_the_axes_of_the_search_are_cut() -> None:
    search = SearchRecipe(axes=["ffn_size"], multiple_of=8, tolerance=0.2)
    config = CONFIGS["llama"]()
    start = sizes_of(config)
    assert [
        set(sizes_to_prune(start, shape)) for shape in shapes(config, search, params="80%")
    ] == [{"ffn_size"}]


def test_at_least_half_of_the_experts_and_those_per_token_are_kept() -> None:
    config = CONFIGS["qwen3_moe"](num_experts=6, num_experts_per_tok=4)
    search = SearchRecipe(axes=["experts"], tolerance=0.5)
    assert [shape.experts for shape in possible_shapes(config, search)] == [6, 5, 4]
    found = shapes(config, search, params="95%")
    assert found
    for shape in found:
        assert set(sizes_to_prune(sizes_of(config), shape)) == {"experts"}
    # A large number of experts is cut in steps that divide evenly among GPUs.
    config = CONFIGS["qwen3_moe"](num_experts=64, num_experts_per_tok=4)
    assert [shape.experts for shape in possible_shapes(config, search)] == [*range(64, 31, -4)]
    assert all(shape.experts is None for shape in possible_shapes(CONFIGS["llama"](), SEARCH))


def test_a_search_over_axes_that_gradients_cannot_rank_is_rejected_early() -> None:
    config, target = CONFIGS["qwen3_moe"](), TargetRecipe(params="80%")
    section = PrunedStudent(start="pruned", search=SEARCH, target=target, importance="gradients")
    with pytest.raises(RecipeError, match="gradients cannot rank experts"):
        planned_config(section, config, Path())
    depth = SearchRecipe(axes=["layers", "hidden_size"], multiple_of=8, tolerance=0.3)
    planned_config(section.model_copy(update={"search": depth}), config, Path())
    with pytest.raises(RecipeError, match="gradients cannot rank the neurons of experts"):
        planned_config(
            PrunedStudent(start="pruned", ffn_size=8, importance="gradients"), config, Path()
        )


def test_coarse_alignment_is_preferred_if_it_fits() -> None:
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
        ({"params": "5%"}, "smaller than the axes .* allow"),
        ({"params": "100%"}, "not smaller than the model"),
        ({"params": "3M"}, "not smaller than the model"),
    ],
)
def test_targets_out_of_reach_name_the_nearest_shape(target: dict[str, Any], message: str) -> None:
    config = CONFIGS["llama"]()
    with pytest.raises(RecipeError, match=message) as caught:
        shapes(config, **target)
    assert caught.value.where == "student.target.params"
    assert "nearest: " in str(caught.value.fix)


def test_a_gap_between_aligned_shapes_names_the_nearest_one() -> None:
    search = SearchRecipe(axes=["layers"], tolerance=0.01)
    with pytest.raises(RecipeError, match="no aligned shape is at most") as caught:
        shapes(CONFIGS["llama"](), search, params="80%")
    assert "layers: 2" in str(caught.value.fix)
    assert "tolerance" in str(caught.value.fix)


def test_a_planned_shape_meets_a_target_that_needs_no_measurement() -> None:
    config = CONFIGS["llama"]()
    counter = Counter(config)
    planned = planned_shape(config, SEARCH, TargetRecipe(params="70%"), width=2)
    assert 0.63 <= counter.total(planned) / counter.total(counter.start) <= 0.7
    timed = TargetRecipe(decode_latency="1ms")
    assert planned_shape(config, SEARCH, timed, width=2) == counter.start


def test_a_plan_counts_the_bytes_of_the_exported_type() -> None:
    config = CONFIGS["llama"]()
    whole = Counter(config).total(sizes_of(config))
    section = PrunedStudent(start="pruned", search=SEARCH, target=TargetRecipe(bytes=3 * whole))
    planned = planned_config(section, config, Path(), served=torch.float32)
    assert 0.67 <= Counter(config).total(sizes_of(planned)) / whole <= 0.75
    with pytest.raises(RecipeError, match="not smaller than the model"):
        planned_config(section, config, Path(), served=torch.bfloat16)


def test_a_plan_counts_the_tokens_that_are_kept() -> None:
    config = CONFIGS["llama"](vocab_size=400)
    cut = resized_config(config, replace(sizes_of(config), vocabulary=80))
    total = round(0.8 * Counter(cut).total(sizes_of(cut)))
    depth = SearchRecipe(axes=["layers", "ffn_size"], multiple_of=8, tolerance=0.1)
    section = PrunedStudent(start="pruned", search=depth, target=TargetRecipe(params=total))
    with pytest.raises(RecipeError, match="smaller than the axes"):
        planned_config(section, config, Path())
    section = section.model_copy(update={"vocabulary": 80})
    planned = planned_config(section, config, Path())
    assert planned.vocab_size == 80
    assert 0.9 * total <= Counter(planned).total(sizes_of(planned)) <= total
    # How many tokens these are is not known yet, so no target is rejected.
    for later in ("data", VocabularyFile(path="kept.json")):
        section = section.model_copy(update={"vocabulary": later})
        assert sizes_of(planned_config(section, config, Path())) == sizes_of(config)


@pytest.mark.parametrize("key", ["decode_latency", "memory"])
def test_targets_that_must_be_measured_are_not_rejected_early(key: str) -> None:
    config = CONFIGS["llama"]()
    target = TargetRecipe.model_validate({key: "5%"})
    assert planned_shape(config, SEARCH, target, width=2) == sizes_of(config)


SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("search", "sizes", "nearest"),
    [
        ({"tensor_parallel": 8}, SMOLLM2, "tensor_parallel: 6"),
        ({"tensor_parallel": 2, "axes": ["layers"]}, SMOLLM2, "tensor_parallel: 1"),
        (
            {"tensor_parallel": 4, "axes": ["heads", "layers"]},
            {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 90},
            "tensor_parallel: 2",
        ),
    ],
)
def test_sizes_that_do_not_divide_among_the_gpus_are_rejected(
    search: dict[str, Any], sizes: dict[str, int], nearest: str
) -> None:
    config = CONFIGS["qwen3"](hidden_size=72, head_dim=8, **sizes)
    wanted = SearchRecipe(multiple_of=8, **search)
    for target in (TargetRecipe(params="60%"), TargetRecipe(decode_latency="60%")):
        with pytest.raises(RecipeError, match="divide evenly") as caught:
            planned_shape(config, wanted, target, width=2)
        assert caught.value.where == "student.search.tensor_parallel"
        assert nearest in str(caught.value.fix)


def test_with_tensor_parallelism_the_ffn_is_cut_until_it_divides_evenly() -> None:
    config = CONFIGS["qwen3"](num_attention_heads=8, num_key_value_heads=4, intermediate_size=90)
    search = SearchRecipe(multiple_of=8, tolerance=0.3, tensor_parallel=4)
    found = shapes(config, search, params="70%")
    assert found
    assert all(shape.ffn_size % 4 == 0 for shape in found)
    assert max(s.ffn_size for s in possible_shapes(config, search)) == 90


def test_the_start_model_is_timed_even_if_it_does_not_divide_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS["qwen3"](hidden_size=72, head_dim=8, **SMOLLM2)
    search = SearchRecipe(multiple_of=8, tensor_parallel=2, tolerance=0.3)

    def timed(config: Any, sizes: Sizes, *_: Any) -> Timing:
        parts: dict[str, Any] = {
            "attention": sizes.heads,
            "ffn": sizes.ffn_size,
            "rest": 0.0,
            "ends": 0.0,
        }
        named = {key: getattr(sizes, key) for key in ("hidden_size", "heads", "kv_heads")}
        return Timing(**named, ffn_size=sizes.ffn_size, layers=1, **parts)

    monkeypatch.setattr(costs, "time_shape", timed)
    target = TargetRecipe(decode_latency="70%")
    journal = Journal(tmp_path / "journal.json")
    found = costs.costs_of(
        config, Counter(config), search, target, torch.bfloat16, torch.device("cpu"), journal
    )
    start = sizes_of(config)
    assert found.limit.unpruned == start.layers * (start.heads + start.ffn_size)
    chosen = feasible_shapes(config, search, found.of, found.limit)
    assert all(shape.heads % 2 == 0 for shape in chosen)


def test_an_error_names_no_shape_if_the_axes_allow_no_smaller_one() -> None:
    config = CONFIGS["llama"](hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    search = SearchRecipe(axes=["hidden_size"], multiple_of=32)
    with pytest.raises(RecipeError, match="the axes hidden_size allow no smaller shape") as caught:
        shapes(config, search, params="80%")
    assert "add axes" in str(caught.value.fix)


@pytest.mark.parametrize("cost", [33_124.0, 33_120.0, 0.0123456, 1.0, 999_999.0])
def test_the_nearest_amount_that_an_error_names_allows_its_shape(cost: float) -> None:
    before = sizes_of(CONFIGS["llama"]())
    key = "params" if cost >= 1 else "decode_latency"
    named = Limit(key, 0.5 * cost, 0.4 * cost, 1.1 * cost).nearest(before, before, cost)
    amount, share = re.findall(r"nearest: (\S+) \((\d+%)\)", named)[0]
    assert cost <= read_amount(key, amount).value < 1.001 * cost
    assert cost <= read_amount(key, share).value * 1.1 * cost < 1.02 * cost


def test_an_error_does_not_ask_for_more_axes_than_there_are() -> None:
    with pytest.raises(RecipeError, match="no shape's heads and FFN divide evenly") as caught:
        possible_shapes(CONFIGS["llama"](), SearchRecipe(tensor_parallel=7))
    assert "use at most tensor_parallel:" in str(caught.value.fix)
    assert "add axes" not in str(caught.value.fix)
