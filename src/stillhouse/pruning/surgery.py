"""Cut a model in place, update its configuration, and check the saved checkpoint.

Shapes: D hidden width, A attention width, E experts, F FFN width, K kept neurons, V tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.turn_end import keep_other_values
from stillhouse.errors import ModelError, RecipeError
from stillhouse.pruning.axes import Axes
from stillhouse.pruning.offload import is_large, released_after_use
from stillhouse.pruning.sizes import Sizes, keep_config_layers
from stillhouse.teachers.activations import decoder_layers
from stillhouse.teachers.load_model import check_finite, load_model
from stillhouse.teachers.quiet import quiet


def check_parameters(model: Any, axes: Axes) -> None:
    """Raise ModelError if a layer has a parameter that no axis declares, as it would not be cut."""
    declared = axes.parameters()
    for number, layer in enumerate(decoder_layers(model)):
        unknown = sorted({name for name, _ in layer.named_parameters()} - declared)
        if unknown:
            raise ModelError(
                f"layer {number} has parameters that pruning does not support: "
                f"{', '.join(unknown[:3])}",
                where=model.config.name_or_path or "student.start",
                fix="merge adapters first; variants of an architecture cannot be pruned",
            )


def keep_neurons(layer: Any, kept_K: Tensor, down_DK: Tensor) -> None:
    """Keep one layer's FFN neurons `kept_K`, with `down_DK` as the new down projection."""
    ffn = layer.mlp
    keep_rows(ffn.gate_proj, kept_K)
    keep_rows(ffn.up_proj, kept_K)
    set_weight(ffn.down_proj, down_DK)
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = len(kept_K)


def keep_heads(layer: Any, before: Sizes, heads: Sequence[int], output_DA: Tensor) -> None:
    """Keep the query heads `heads` and their key-value heads, with `output_DA` as the new output
    projection."""
    attention = layer.self_attn
    groups = sorted({head // before.share for head in heads})
    keep_rows(attention.q_proj, torch.tensor(before.columns(heads)))
    keep_rows(attention.k_proj, torch.tensor(before.columns(groups)))
    keep_rows(attention.v_proj, torch.tensor(before.columns(groups)))
    set_weight(attention.o_proj, output_DA)
    attention.num_key_value_groups = len(heads) // len(groups)


def keep_experts(layer: Any, kept_E: Tensor) -> None:
    """Keep one layer's experts `kept_E` and the router's rows for them."""
    router, experts = layer.mlp.gate, layer.mlp.experts
    for module, name in ((router, "weight"), (experts, "gate_up_proj"), (experts, "down_proj")):
        set_parameter(module, name, getattr(module, name)[kept_E])
        module.num_experts = len(kept_E)


def keep_tokens(model: Any, kept_V: Tensor) -> None:
    """Keep the embedding and head rows of the tokens `kept_V`, in that order.

    Token ids in the configurations (end of sequence, etc.) are renumbered; see `check_tokens`.
    """
    _keep_rows_of_ends(model, kept_V)
    new_ids = _new_ids(kept_V)
    for config in (model.config, model.generation_config):
        for name, value in special_ids(config).items():
            found = [new_ids[old] for old in value] if isinstance(value, list) else new_ids[value]
            setattr(config, name, found)
    keep_other_values(model.generation_config)
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None:
        embedding.padding_idx = model.config.pad_token_id
        model.base_model.padding_idx = model.config.pad_token_id


def cut_rows_without_tokens(model: Any, tokens: int) -> bool:
    """Cut the embedding and head rows after the first `tokens`, and after any id that a
    configuration names. Return whether there were any."""
    rows = model.get_output_embeddings().weight.shape[0]
    named = [*named_ids(model.config), *named_ids(model.generation_config)]
    count = max([tokens, *(token + 1 for token, _ in named if token < rows)])
    if count < rows:
        _keep_rows_of_ends(model, torch.arange(count))
    return count < rows


def _keep_rows_of_ends(model: Any, kept_V: Tensor) -> None:
    """Keep these rows of the embeddings and the head. Renumber the lists of tokens that generation
    forbids, forces, or weights; entries with removed tokens are dropped."""
    new_ids = _new_ids(kept_V)
    for config in (model.config, model.generation_config):
        for name in ("begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias"):
            if listed := getattr(config, name, None):
                setattr(config, name, _renumbered(listed, new_ids) or None)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    set_parameter(embedding, "weight", embedding.weight[kept_V])
    embedding.num_embeddings = len(kept_V)
    if tied:
        head.weight = embedding.weight
        head.out_features = len(kept_V)
    else:
        keep_rows(head, kept_V)
    model.config.get_text_config().vocab_size = len(kept_V)
    model.vocab_size = len(kept_V)
    if hasattr(model.base_model, "vocab_size"):
        model.base_model.vocab_size = len(kept_V)


def _new_ids(kept_V: Tensor) -> dict[int, int]:
    return {old: new for new, old in enumerate(kept_V.tolist())}


def _renumbered(listed: Any, new_ids: Mapping[int, int]) -> list[Any]:
    """Renumber a list of token ids, of sequences (with or without a bias each), or of lists of
    sequences. Tokens that are not in `new_ids`, and sequences that contain one, are dropped."""
    if isinstance(listed, Mapping):  # from a sequence to its bias
        listed = [[list(ids), bias] for ids, bias in listed.items()]
    found: list[Any] = []
    for one in listed:
        if isinstance(one, int):
            found += [new_ids[one]] if one in new_ids else []
        elif isinstance(one[0], int):
            found += [[new_ids[id] for id in one]] if new_ids.keys() >= set(one) else []
        elif isinstance(one[-1], int | float):
            found += [[ids, one[-1]] for ids in _renumbered(one[:1], new_ids)]
        else:
            found += [kept] if (kept := _renumbered(one, new_ids)) else []
    return found


def check_tokens(model: Any, kept: Collection[int]) -> None:
    """Raise RecipeError if `kept` has a token that the model does not have, or lacks one that its
    configurations name."""
    rows = model.config.vocab_size
    beyond = [token for token in kept if not 0 <= token < rows]
    if beyond:
        raise RecipeError(
            f"the vocabulary contains token {beyond[0]}, but the teacher has only {rows} embedding "
            "rows",
            where="student.vocabulary",
            fix=f"use ids from 0 to {rows - 1}",
        )
    for config in (model.config, model.generation_config):
        for token, name in named_ids(config):
            if token not in kept:
                raise RecipeError(
                    f"the vocabulary would lose token {token}, which is the model's {name}",
                    where="student.vocabulary",
                    fix="keep it (pruning.kept_token_ids does)",
                )


def special_ids(config: Any) -> dict[str, int | list[int]]:
    """The token ids that a (generation) configuration names; negative ids mean none and are left
    out."""
    found: dict[str, int | list[int]] = {}
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_ids")) or name == "suppress_tokens":
            ids = value if isinstance(value, list) else [value]
            if ids and all(isinstance(one, int) and one >= 0 for one in ids):
                found[name] = value
    return found


def named_ids(config: Any) -> list[tuple[int, str]]:
    """Every id of `special_ids`, with its name."""
    found = special_ids(config).items()
    return [(id, name) for name, ids in found for id in (ids if isinstance(ids, list) else [ids])]


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Keep the layers `kept`, renumber them for the KV cache, and update the configuration."""
    old = list(decoder_layers(model))
    model.base_model.layers = nn.ModuleList(old[index] for index in kept)
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010 (a plain int among tensors)
    keep_config_layers(model.config, kept)


def own_config(model: Any) -> None:
    """Give the model its own copy of its configuration, in case other objects share it."""
    config = copy.deepcopy(model.config)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config


@torch.no_grad()
def check_saved(model: Any, folder: Path, input_ids_RL: Tensor) -> None:
    """Reload `folder` and compare its logits with those of the model in memory.

    Raises ModelError if a weight is missing or unexpected, or if the logits differ.
    """

    def check_and_drop(layer: nn.Module, *_: object) -> None:
        """The layer is used only once, so it does not have to stay in memory."""
        check_finite(layer, folder)
        layer.to("meta")

    with quiet():
        with released_after_use(model):
            expected = model(input_ids=input_ids_RL, use_cache=False).logits
        large = is_large(model)
        loaded = load_model(folder, dtype=torch.float32, finite=not large)
        if large:
            for layer in decoder_layers(loaded):
                layer.register_forward_hook(check_and_drop)
        found = loaded(input_ids=input_ids_RL, use_cache=False).logits
        if large:
            check_finite(loaded, folder)
    error = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    if not error <= 1e-5:
        raise ModelError(
            "the saved checkpoint does not load as the same model: its logits differ by "
            f"{error:.2g}",
            where=folder,
            fix="please report this as a bug in Stillhouse's support for this architecture",
        )


def keep_rows(linear: Any, kept: Tensor) -> None:
    """Keep the outputs `kept` of a linear layer, including their biases."""
    set_weight(linear, linear.weight[kept])
    if linear.bias is not None:
        set_parameter(linear, "bias", linear.bias[kept])


def set_weight(linear: Any, weight: Tensor) -> None:
    set_parameter(linear, "weight", weight)
    linear.out_features, linear.in_features = weight.shape


def set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    """Replace a parameter with one that can have a different shape; its dtype stays the same."""
    old = getattr(module, name)
    values = values.detach().to(old.dtype).clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(values, requires_grad=old.requires_grad))
