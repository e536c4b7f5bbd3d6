"""Possible sizes, and errors for impossible ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import Gemma3Config, Mistral3Config

from stillhouse.errors import ModelError, RecipeError
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.sizes import check_sizes
from stillhouse.students.build_student import planned_config
from stillhouse.students.student_config import PrunedStudent
from tests.teachers.toys import ToyWindows, tiny_model


@pytest.mark.parametrize(
    ("config", "inside"),
    [(Gemma3Config(), "gemma3_text"), (Mistral3Config(), "mistral")],
    ids=["gemma3", "mistral3"],
)
def test_models_that_also_read_images_are_rejected_with_a_fix(config: Any, inside: str) -> None:
    with pytest.raises(ModelError, match="have inputs other than text") as caught:
        check_sizes(config, {"ffn_size": 16})
    assert f"its text model ({inside})" in str(caught.value.fix)


GROUPED = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "sizes", "message", "nearest"),
    [
        ("qwen3", {"heads": 7}, "heads: 7 is not possible with 3 key-value heads", "heads: 6"),
        ("qwen3", {"heads": 8}, "heads: 8 is not possible", "heads: 9"),
        ("qwen3", {"heads": 12, "kv_heads": 2}, "with 2 key-value heads", "heads: 8"),
        ("qwen3", {"heads": 13}, "the teacher has 12", "1 to 12"),
        ("qwen3", {"kv_heads": 4}, "kv_heads: 4 is not possible: the teacher has 3", "1 to 3"),
        ("qwen3", {"hidden_size": 97}, "the teacher has 96", "1 to 96"),
        ("qwen3", {"experts": 2}, "qwen3 models have no experts", "ffn_size"),
        ("qwen3", {"vocabulary": 97}, "the teacher has 96", "1 to 96"),
        (
            "llama",
            {"hidden_size": 62},
            "62 is not a multiple of heads: 12",
            "hidden_size: 60 or 72",
        ),
        ("llama", {"heads": 9}, "96 is not a multiple of heads: 9", "heads: 8 with kv_heads: 2"),
        ("gemma2", {"hidden_size": 80}, "80 is not a multiple of heads: 12", "72 or 84"),
        (
            "gemma2",
            {"hidden_size": 72, "hidden_method": "rotation"},
            "gemma2 cannot be rotated: the norm after each block",
            "hidden_method: channels",
        ),
        (
            "gemma",
            {"hidden_size": 72, "hidden_method": "rotation"},
            "gemma cannot be rotated: that unties the head",
            "hidden_method: channels",
        ),
        ("qwen3_moe", {"experts": 1}, "every token goes to 2", "2 to 6"),
        ("qwen3_moe", {"experts": 7}, "the teacher has 6", "2 to 6"),
        ("qwen3_moe", {"ffn_size": 33}, "ffn_size: 33 is not possible: the teacher has 32", "32"),
    ],
)
def test_the_error_for_an_impossible_size_names_the_nearest_one(
    kind: str, sizes: dict[str, Any], message: str, nearest: str
) -> None:
    wanted = {**sizes}
    method = wanted.pop("hidden_method", "channels")
    with pytest.raises(RecipeError, match=message) as caught:
        check_sizes(tiny_model(kind, **GROUPED).config, wanted, hidden_method=method)
    assert nearest in str(caught.value.fix)
    assert str(caught.value.where).startswith("student.")


def test_the_nearest_size_in_a_message_is_possible() -> None:
    config = tiny_model("llama", **GROUPED).config
    for sizes in ({"hidden_size": 60}, {"hidden_size": 72}, {"heads": 8, "kv_heads": 2}):
        check_sizes(config, sizes)


def test_without_groups_a_head_is_removed_with_its_keys_and_values() -> None:
    config = tiny_model("mistral", num_attention_heads=4, num_key_value_heads=4).config
    after = check_sizes(config, {"heads": 3})
    assert (after.heads, after.kv_heads, after.head_dim) == (3, 3, 8)


def test_unaligned_sizes_and_unusual_head_sizes_are_noted() -> None:
    model = tiny_model("qwen2", hidden_size=64)
    report = prune_model(model, ToyWindows(), calibration_tokens=64, hidden_size=48)
    assert "hidden_size: 48 is not a multiple of 32" in report.notes[0]
    assert "nearest: 32 or 64" in report.notes[0]
    assert "head_dim is 16, which no longer equals hidden_size / heads" in report.notes[1]
    aligned = tiny_model("llama", hidden_size=64)
    assert prune_model(aligned, ToyWindows(), calibration_tokens=64, hidden_size=32).notes == ()


def test_the_planned_configuration_is_the_students() -> None:
    model = tiny_model("smollm3", tie_word_embeddings=True)
    sizes: dict[str, Any] = {
        "layers": 2,
        "heads": 2,
        "hidden_size": 24,
        "hidden_method": "rotation",
        "ffn_size": 40,
    }
    planned = planned_config(PrunedStudent(start="pruned", **sizes), model.config, Path())
    prune_model(model, ToyWindows(), calibration_tokens=64, **sizes)
    differing = {
        key
        for key, value in model.config.to_dict().items()
        # Which layers are kept depends on the text.
        if planned.to_dict()[key] != value and key not in ("no_rope_layers", "layer_types")
    }
    assert differing == set()
    assert not planned.tie_word_embeddings


def test_a_vocabulary_that_the_text_decides_is_planned_at_full_size() -> None:
    config = tiny_model().config
    section = PrunedStudent(start="pruned", vocabulary="data")
    assert planned_config(section, config, Path()).vocab_size == config.vocab_size
    smaller = PrunedStudent(start="pruned", vocabulary=64)
    assert planned_config(smaller, config, Path()).vocab_size == 64


def test_a_method_without_a_size_is_an_error() -> None:
    with pytest.raises(ValidationError, match="hidden_method does nothing without hidden_size"):
        PrunedStudent(start="pruned", ffn_size=3, hidden_method="rotation")
