"""Configuration and seeded initialization of a student with random weights."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from stillhouse.errors import ModelError, RecipeError
from stillhouse.pruning.sizes import keep_config_layers
from stillhouse.teachers.load_model import attention_for
from stillhouse.teachers.planned_model import planned_model
from stillhouse.teachers.shared_vocabulary import token_count

Value = int | float | bool | str

FOLLOWERS = {
    "head_dim": ("hidden_size", "num_attention_heads"),
    "num_key_value_heads": ("num_attention_heads",),
}
"""Values that configurations derive from others and that must be recomputed when these change."""

MOST_PARTS, LARGEST_WIDTH = 10_000, 2**24
"""Limits for new configurations: the number of layers, heads, or experts, and any width."""


def overridden_config(config: Any, overrides: Mapping[str, Value]) -> Any:
    """Create a configuration with `overrides`, after checking every key and type.

    A new num_hidden_layers shortens per-layer lists, or continues their pattern.
    Raises RecipeError: an unknown key (with the closest one), a wrong type, or values that the
    architecture does not allow.
    """
    known = config.to_dict()
    known.pop("quantization_config", None)  # random weights are floats
    for key, value in overrides.items():
        _check_override(config, known, key, value)
    # Configurations require floats, so 1 becomes 1.0.
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
    heads = getattr(made, "num_attention_heads", None)
    groups = getattr(made, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise _impossible(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
        )
    return made


def for_tokenizer(config: Any, tokenizer: Any) -> Any:
    """Copy a configuration for a different tokenizer, with its number of tokens, BOS, and EOS.

    There is no padding token, since its embedding would not be trained.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config()
    text.vocab_size, text.pad_token_id = token_count(tokenizer), None
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return made


def random_model(config: Any, seed: int) -> Any:
    """Create a float32 model with the architecture's own initialization, determined by the seed.

    The global random state is not changed. Raises RecipeError if the model cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention_for(config)
            )
        except MemoryError:
            raise
        # A value that an architecture does not expect can fail anywhere in its constructor.
        except Exception as error:
            raise _impossible(str(error) or type(error).__name__) from error
    return model.eval()


def require_possible(config: Any, *, trusted: bool = False) -> None:
    """Raise RecipeError if no model can be built with a configuration that has overrides.

    trusted: whether code that comes with the configuration may run.
    """
    try:
        planned_model(config, trusted=trusted)
    except ModelError as error:
        raise _impossible(error.what) from error


def require_rows(config: Any, tokenizer: Any) -> None:
    """Raise RecipeError if a configuration's overrides leave fewer rows than the tokenizer has
    tokens."""
    rows, tokens = config.get_text_config().vocab_size, token_count(tokenizer)
    if rows < tokens:
        raise RecipeError(
            f"vocab_size is {rows:,}, but the student's tokenizer has {tokens:,} tokens",
            where="student.overrides.vocab_size",
            fix=f"set it to at least {tokens}, or remove it",
        )


def _check_override(config: Any, known: Mapping[str, Any], key: str, value: Value) -> None:
    wrong = partial(RecipeError, where=f"student.overrides.{key}")
    if key not in known:
        near = difflib.get_close_matches(key, list(known), n=1)
        fix = f"did you mean {near[0]!r}?" if near else "see the model's config.json"
        raise wrong(f"{type(config).__name__} has no key {key!r}", fix=fix)
    if key in ("model_type", "architectures", "dtype", "transformers_version"):
        fix = "choose a different model with student.config"
        raise wrong(f"{key} cannot be changed", fix=fix)
    old = known[key]
    if isinstance(old, list | dict):
        raise wrong(
            f"{key} is a {type(old).__name__}, but overrides must be single values",
            fix="write your own config.json, and set student.config to its folder",
        )
    if isinstance(value, int) and (key.startswith("num_") or key.endswith("_size")):
        most = MOST_PARTS if key.startswith("num_") else LARGEST_WIDTH
        if value < 1:
            raise wrong(f"{key} must be positive", fix="choose 1 or more")
        if value > most:
            fix = f"choose {most:,} or less"
            raise wrong(f"{key} is {value:,}, which is more than {most:,}", fix=fix)
    whole_for_float = isinstance(old, float) and type(value) is int
    if not (old is None or type(value) is type(old) or whole_for_float):
        raise wrong(
            f"{key} must be of type {type(old).__name__}, like {old!r}; {value!r} is not",
            fix="give a value of that type",
        )


def _derived(known: Mapping[str, Any], follower: str) -> bool:
    """Whether the old value is the one that the architecture derives from other values."""
    heads = known.get("num_attention_heads")
    if not isinstance(heads, int):
        return False
    derived = known.get("hidden_size", 0) // heads if follower == "head_dim" else heads
    return known.get(follower) == derived


def _impossible(reason: str) -> RecipeError:
    return RecipeError(
        f"the student's configuration is invalid: {reason.strip().splitlines()[-1].strip()}",
        where="student.overrides",
        fix="use values that this architecture allows, and sizes that fit together",
    )
