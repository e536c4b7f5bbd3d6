"""Overrides of a configuration: derived values, and which overrides are rejected."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from stillhouse.errors import RecipeError
from stillhouse.students import random_student
from stillhouse.students.random_student import (
    overridden_config,
    random_model,
    require_possible,
)
from tests.teachers.toys import tiny_model


def override(kind: str = "llama", before: dict[str, Any] | None = None, **overrides: Any) -> Any:
    return overridden_config(tiny_model(kind, **(before or {})).config, overrides)


def test_overrides_do_not_change_the_original_configuration() -> None:
    original = tiny_model().config
    made = overridden_config(original, {"intermediate_size": 48, "rms_norm_eps": 1})
    assert (made.intermediate_size, made.rms_norm_eps) == (48, 1)
    assert original.intermediate_size == 64


def test_derived_values_follow_an_override() -> None:
    made = override(hidden_size=64, num_attention_heads=4)
    assert made.head_dim == 16
    no_groups = override(before={"num_key_value_heads": 4}, num_attention_heads=2)
    assert no_groups.num_key_value_heads == 2
    stated = override(before={"head_dim": 24}, hidden_size=64)
    assert stated.head_dim == 24, "an explicit head_dim is kept"


def test_per_layer_lists_follow_the_number_of_layers() -> None:
    fewer = override("gemma2", {"num_hidden_layers": 4}, num_hidden_layers=3)
    assert fewer.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    no_rope = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}
    more = override("smollm3", no_rope, num_hidden_layers=6)
    assert more.no_rope_layers == [1, 1, 0, 1, 1, 1]
    model = random_model(more, 0)
    ids = torch.arange(3, 20)[None]
    assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"hidden_size": 32.5}, "must be of type int"),
        ({"hidden_size": True}, "must be of type int"),
        ({"rms_norm_eps": "small"}, "must be of type float"),
        ({"model_type": "qwen2"}, "cannot be changed"),
        ({"rope_parameters": "none"}, "overrides must be single values"),
        ({"hidden_size": 30}, "not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
        ({"hidden_size": -32}, "hidden_size must be positive"),
        ({"hidden_act": "no-such-act"}, "is invalid"),
    ],
)
def test_invalid_overrides_are_rejected(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        random_model(override(**overrides), 0)
    assert "student.overrides" in str(caught.value.where)


@pytest.mark.parametrize("overrides", [{"hidden_act": "no-such-act"}, {"pad_token_id": 10**6}])
def test_overrides_that_no_model_can_have_are_rejected_before_it_is_built(
    overrides: dict[str, Any],
) -> None:
    with pytest.raises(RecipeError, match="is invalid: transformers cannot build") as caught:
        require_possible(override(**overrides))
    assert caught.value.where == "student.overrides"


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), AssertionError()])
def test_any_error_of_a_constructor_names_the_overrides(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(
        random_student, "AutoModelForCausalLM", Mock(**{"from_config.side_effect": error})
    )
    with pytest.raises(RecipeError, match=str(error) or "AssertionError") as caught:
        random_model(override(), 0)
    assert caught.value.where == "student.overrides"
