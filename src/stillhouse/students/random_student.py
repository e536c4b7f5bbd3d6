"""A student with random weights: its configuration, and its seeded initialization."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from stillhouse.errors import RecipeError
from stillhouse.pruning.sizes import keep_config_layers
from stillhouse.teachers.load_model import attention_for
from stillhouse.teachers.shared_vocabulary import token_count

Value = int | float | bool | str

FOLLOWERS = {
    "head_dim": ("hidden_size", "num_attention_heads"),
    "num_key_value_heads": ("num_attention_heads",),
}
"""Values that configurations derive from others, and that must be recomputed with them."""

MOST_PARTS, LARGEST_WIDTH = 10_000, 2**24
"""Limits of a configuration that is created here: layers, heads or experts, and any width."""


def overridden_config(config: Any, overrides: Mapping[str, Value]) -> Any:
    """A new configuration with `overrides`; every key and type is checked against the old one.

    A new num_hidden_layers shortens per-layer lists, or continues their pattern.
    Raises RecipeError with the closest key, or with what the architecture does not allow.
    """
    known = config.to_dict()
    known.pop("quantization_config", None)  # random weights are floats
    for key, value in overrides.items():
        _check_override(config, known, key, value)
    # Configurations require a float; 1 means 1.0.
    overrides = {
        key: float(value) if isinstance(known[key], float) else value
        for key, value in overrides.items()
    }
    changed = type(config).from_dict(known)
    if "num_hidden_layers" in overrides:
        count, before = int(overrides["num_hidden_layers"]), changed.num_hidden_layers
        keep_config_layers(changed, [index % before for index in range(count)])
    values = {**changed.to_dict(), **overrides}
    for follower, leaders in FOLLOWERS.items():
        leader_changed = any(leader in overrides for leader in leaders)
        if leader_changed and follower not in overrides and _derived(known, follower):
            values.pop(follower, None)
    try:
        made = type(config).from_dict(values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise _impossible(str(error)) from error
    _check_heads(made)
    return made


def for_tokenizer(config: Any, tokenizer: Any) -> Any:
    """A copy of a configuration for a tokenizer that is not its own: as many rows as tokens, and
    the tokenizer's first and last token of a text.

    There is no padding token: its embedding would not be trained.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config()
    text.vocab_size, text.pad_token_id = token_count(tokenizer), None
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return made


def random_model(config: Any, seed: int) -> Any:
    """A float32 model with the architecture's own initialization; the same seed, the same weights.

    The global random state is not changed. Raises RecipeError if the model cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention_for(config)
            )
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise _impossible(str(error)) from error
    return model.eval()


def _check_override(config: Any, known: Mapping[str, Any], key: str, value: Value) -> None:
    where = f"student.overrides.{key}"
    if key not in known:
        near = difflib.get_close_matches(key, list(known), n=1)
        raise RecipeError(
            f"{type(config).__name__} has no value {key!r}",
            where=where,
            fix=f"did you mean {near[0]!r}?" if near else "see the model's config.json",
        )
    if key in ("model_type", "architectures", "dtype", "transformers_version"):
        raise RecipeError(
            f"{key} cannot be changed",
            where=where,
            fix="choose another start with student.config",
        )
    old = known[key]
    if isinstance(old, list | dict):
        raise RecipeError(
            f"{key} is a {type(old).__name__}, and overrides are single values",
            where=where,
            fix="write a config.json of your own and name its folder in student.config",
        )
    is_size = key.startswith("num_") or key.endswith("_size")
    if is_size and isinstance(value, int) and value < 1:
        raise RecipeError(f"{key} must be positive", where=where, fix="choose 1 or more")
    most = MOST_PARTS if key.startswith("num_") else LARGEST_WIDTH
    if is_size and isinstance(value, int) and value > most:
        raise RecipeError(
            f"{key} is {value:,}, and no model has that",
            where=where,
            fix=f"choose {most:,} or less",
        )
    if old is None or type(value) is type(old):
        return
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return
    raise RecipeError(
        f"{key} must be of type {type(old).__name__} like {old!r}, and {value!r} is not",
        where=where,
        fix="write the value in that type",
    )


def _derived(known: Mapping[str, Any], follower: str) -> bool:
    """Whether the old value is the architecture's default."""
    heads = known.get("num_attention_heads")
    if not isinstance(heads, int):
        return False
    if follower == "head_dim":
        return known.get("head_dim") == known.get("hidden_size", 0) // heads
    return known.get(follower) == heads


def _check_heads(config: Any) -> None:
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise _impossible(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
        )


def _impossible(reason: str) -> RecipeError:
    return RecipeError(
        f"the student's configuration is not possible: {reason.strip().splitlines()[-1].strip()}",
        where="student.overrides",
        fix="change the sizes so that they fit each other",
    )
