"""The sizes that pruning changes, which of them are possible, and how a configuration stores
them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from stillhouse.attention_heads import head_size
from stillhouse.errors import RecipeError
from stillhouse.pruning.axes import PER_LAYER_LISTS, Axes, axes_of

HiddenMethod = Literal["channels", "rotation"]

ALIGNMENT = 32
"""GGUF's block formats need row lengths that are multiples of 32 (k-quants: 256); other rows fall
back to f16."""


@dataclass(frozen=True)
class Sizes:
    """A model's size along every axis.

    heads: number of query heads.
    kv_heads: number of key-value heads, and so of groups of query heads that share one.
    ffn_size: FFN width; if there are experts, of one expert.
    experts: number of experts per layer; None if there are none.
    """

    layers: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocabulary: int
    experts: int | None = None

    @property
    def share(self) -> int:
        """Query heads per key-value head: head h belongs to group h // share."""
        return self.heads // self.kv_heads

    def columns(self, heads: Sequence[int]) -> list[int]:
        """The columns of the output projection that read these heads."""
        size = self.head_dim
        return [head * size + offset for head in heads for offset in range(size)]


AXES = tuple(one.name for one in fields(Sizes) if one.name not in ("head_dim", "vocabulary"))
"""Names of the sizes that a recipe sets or a search chooses."""


def sizes_of(config: Any) -> Sizes:
    axes = axes_of(config)
    return Sizes(
        layers=config.num_hidden_layers,
        ffn_size=getattr(config, axes.ffn_size),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_size(config),
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        experts=config.num_experts if axes.experts else None,
    )


def check_sizes(
    config: Any,
    sizes: Mapping[str, int | None],
    *,
    hidden_method: HiddenMethod = "channels",
    text_decides: bool = False,
    owner: str = "the teacher",
) -> Sizes:
    """Check the sizes to prune to, and return all sizes of the resulting student.

    sizes: new sizes, by the names in AXES and "vocabulary"; None leaves an axis unchanged.
    text_decides: the vocabulary will be cut to the text's tokens, so no other size is required.
    owner: what error messages call the model that is pruned.

    Raises RecipeError, naming the nearest possible size, and ModelError if the architecture cannot
    be pruned.
    """
    axes = axes_of(config)
    before = sizes_of(config)
    given = {key: value for key, value in sizes.items() if value is not None}
    if not given and not text_decides:
        names = ["heads", "kv_heads", "hidden_size", "vocabulary"]
        names += ["experts"] if axes.experts else []
        raise RecipeError(
            "a pruned student needs a size to prune to",
            where="student",
            fix=f"set one or more of ffn_size (1 to {before.ffn_size}), layers (1 to "
            f"{before.layers}), {', '.join(names[:-1])}, and {names[-1]}; or a target",
        )
    if "experts" in given and not axes.experts:
        raise RecipeError(
            f"{config.model_type} models have no experts to prune",
            where="student.experts",
            fix="remove the key; use ffn_size to narrow the FFN",
        )
    for key, value in given.items():
        least = config.num_experts_per_tok if key == "experts" else 1
        largest = getattr(before, key)
        if not least <= value <= largest:
            reason = f"{owner} has {largest}"
            if 1 <= value < least:
                reason = f"every token goes to {least}"
            raise RecipeError(
                f"{key}: {value} is not possible: {reason}",
                where=f"student.{key}",
                fix=f"choose {least} to {largest}",
            )
    after = replace(before, **{key: value for key, value in given.items() if "heads" not in key})
    after = _with_heads(before, after, given.get("heads"), given.get("kv_heads"))
    if after.hidden_size % after.heads and axes.hidden_over_heads:
        raise _hidden_over_heads(config, before, after, "hidden_size" in given)
    if hidden_method == "rotation":
        _check_rotation(config, axes)
    return after


def _check_rotation(config: Any, axes: Axes) -> None:
    if axes.output_norms():
        reason = "the norm after each block scales channels, which a rotation would mix"
    elif axes.always_tied:
        reason = (
            "that unties the head, but llama.cpp only supports this architecture with tied ones"
        )
    else:
        return
    raise RecipeError(
        f"{config.model_type} cannot be rotated: {reason}",
        where="student.hidden_method",
        fix="use hidden_method: channels",
    )


def _with_heads(before: Sizes, after: Sizes, heads: int | None, kv_heads: int | None) -> Sizes:
    """Remove the same number of query heads from every remaining group."""
    share = before.share
    if heads is None:
        kept = before.kv_heads if kv_heads is None else kv_heads
        return replace(after, heads=kept * share, kv_heads=kept)
    if kv_heads is None:
        kv_heads = before.kv_heads if share > 1 else heads
    if heads % kv_heads or heads > kv_heads * share:
        possible = [kv_heads * each for each in range(1, share + 1)]
        nearest = min(possible, key=lambda value: (abs(value - heads), -value))
        each = f"1 to {share}" if share > 1 else "exactly 1"
        raise RecipeError(
            f"heads: {heads} is not possible with {kv_heads} key-value heads: each must keep the "
            f"same number of query heads, {each}",
            where="student.heads",
            fix=f"nearest: heads: {nearest}"
            + ("" if len(possible) == 1 else "; or change kv_heads"),
        )
    return replace(after, heads=heads, kv_heads=kv_heads)


def _hidden_over_heads(config: Any, before: Sizes, after: Sizes, given: bool) -> RecipeError:
    below = after.hidden_size // after.heads * after.heads
    above = below + after.heads
    sizes = [size for size in (below, above) if 0 < size <= before.hidden_size]
    fix = f"nearest: hidden_size: {' or '.join(map(str, sizes))}"
    if not given:
        pairs = [
            (groups * each, groups)
            for groups in range(1, before.kv_heads + 1)
            for each in range(1, before.share + 1)
            if after.hidden_size % (groups * each) == 0
        ]
        heads, groups = min(
            pairs, key=lambda pair: (abs(pair[0] - after.heads), pair[1] != after.kv_heads)
        )
        fix = f"nearest: heads: {heads} with kv_heads: {groups}, or {fix.removeprefix('nearest: ')}"
    return RecipeError(
        f"hidden_size: {after.hidden_size} is not a multiple of heads: {after.heads}, which "
        f"transformers requires of {config.model_type} models",
        where="student.hidden_size" if given else "student.heads",
        fix=fix,
    )


def size_notes(config: Any, before: Sizes, after: Sizes, rotated: bool) -> list[str]:
    """Notes on the new sizes' consequences for exported files."""
    notes = []
    axes = axes_of(config)
    for key in ("hidden_size", "ffn_size"):
        value, size = getattr(after, key), getattr(before, key)
        if value != size and value % ALIGNMENT and size % ALIGNMENT == 0:
            below = value // ALIGNMENT * ALIGNMENT
            nearest = " or ".join(str(each) for each in (below, below + ALIGNMENT) if each)
            notes.append(
                f"{key}: {value} is not a multiple of {ALIGNMENT}, which GGUF's quantized formats "
                f"require; nearest: {nearest}"
            )
    derived = after.hidden_size // after.heads == after.head_dim
    if not axes.head_dim_key and not derived and before != after:
        notes.append(
            f"head_dim is {after.head_dim}, which no longer equals hidden_size / heads: "
            "transformers and llama.cpp read it from config.json, but other loaders of "
            f"{config.model_type} models might not"
        )
    if rotated and config.tie_word_embeddings:
        extra = after.vocabulary * after.hidden_size
        notes.append(
            f"the rotation unties the head from the embeddings, which adds {extra / 1e6:,.1f}M "
            "parameters compared with hidden_method: channels"
        )
    return notes


def resized_config(config: Any, after: Sizes, *, rotated: bool = False) -> Any:
    """A copy of the configuration with the sizes `after`. Per-layer lists keep the first layers'
    entries, since the kept layers are not known yet.

    rotated: the hidden channels will be rotated, which unties the head from the embeddings.
    """
    config = copy.deepcopy(config)
    if after.layers != config.num_hidden_layers:
        keep_config_layers(config, range(after.layers))
    set_sizes(config, after)
    if rotated:
        config.tie_word_embeddings = False
    return config


def set_sizes(config: Any, after: Sizes) -> None:
    """Write all sizes except the number of layers (see `keep_config_layers`)."""
    axes = axes_of(config)
    if after.head_dim != getattr(config, "head_dim", None) and (
        axes.head_dim_key or after.hidden_size // after.heads != after.head_dim
    ):
        config.head_dim = after.head_dim
    config.num_attention_heads = after.heads
    config.num_key_value_heads = after.kv_heads
    config.hidden_size = after.hidden_size
    config.vocab_size = after.vocabulary
    setattr(config, axes.ffn_size, after.ffn_size)
    if axes.experts:
        config.num_experts = after.experts


def keep_config_layers(config: Any, kept: Sequence[int]) -> None:
    """Keep the layers `kept` (indices may repeat) in num_hidden_layers and every per-layer list."""
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == config.num_hidden_layers:
            setattr(config, name, [values[index] for index in kept])
    config.num_hidden_layers = len(kept)
