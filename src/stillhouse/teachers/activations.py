"""A forward pass that keeps intermediate activations, from the embeddings to the final norm.

Shapes: R windows, L tokens, D hidden width. Layer 0 is the embeddings, layer i the output of block
i; the last layer is the last hidden state, after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.objectives import AttentionStates, capture
from stillhouse.objectives.relation import RELATIONS, require_projections
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.document_rows import run_documents, separates_documents


@dataclass(frozen=True)
class ActivationRequest:
    """The activations to keep: outputs of `layers`, and attention projections of blocks.

    Layer 0 is the embeddings; blocks are numbered from 1.
    """

    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.layers or self.attention)


@dataclass(frozen=True)
class Activations:
    """The activations of one pass: [R, L, D] for each layer, attention states for each block."""

    last_RLD: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionStates] = field(default_factory=dict)


def run_backbone(
    model: Any,
    input_ids_RL: Tensor,
    position_ids_RL: Tensor | None,
    request: ActivationRequest,
    documents: Tensor | None = None,
) -> Activations:
    """Run the backbone as `hidden_states` does, and keep the requested activations.

    Raises ModelError or SignalError if the model lacks a requested part.
    """
    if not request:
        return Activations(hidden_states(model, input_ids_RL, position_ids_RL, documents))
    if position_ids_RL is None or separates_documents(model):
        return _run_hooked(model, input_ids_RL, position_ids_RL, request, documents)
    layers, blocks = sorted(request.layers), sorted(request.attention)

    def run(ids_SL: Tensor) -> list[Tensor]:
        found = _run_hooked(model, ids_SL, None, request, None)
        states = (found.attention[block][name] for block in blocks for name in RELATIONS)
        return [found.last_RLD, *(found.layers[layer] for layer in layers), *states]

    last_RLD, *rest = run_documents(model, run, input_ids_RL, position_ids_RL)
    left = iter(rest)
    return Activations(
        last_RLD,
        {layer: next(left) for layer in layers},
        {block: {name: next(left) for name in RELATIONS} for block in blocks},
    )


def _run_hooked(
    model: Any,
    input_ids_RL: Tensor,
    position_ids_RL: Tensor | None,
    request: ActivationRequest,
    documents: Tensor | None,
) -> Activations:
    blocks, layers = decoder_layers(model), dict[int, Tensor]()

    def keep_input(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        layers[0] = inputs[0] if inputs else named["hidden_states"]

    def keep(layer: int, _module: nn.Module, _inputs: object, output: Any) -> None:
        layers[layer] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for layer in sorted(request.layers - {0, len(blocks)}):
            stack.enter_context(blocks[layer - 1].register_forward_hook(partial(keep, layer)))
        if 0 in request.layers:
            hook = blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)
            stack.enter_context(hook)
        attention = {
            number: stack.enter_context(capture(_attention(blocks[number - 1])))
            for number in sorted(request.attention)
        }
        last_RLD = hidden_states(model, input_ids_RL, position_ids_RL, documents)
    if len(blocks) in request.layers:
        layers[len(blocks)] = last_RLD
    return Activations(last_RLD, layers, attention)


def require_parts(model: Any, request: ActivationRequest) -> None:
    """Raise ModelError or SignalError if the model lacks parts that `run_backbone` needs."""
    if request:
        blocks = decoder_layers(model)
        for number in sorted(request.attention):
            require_projections(_attention(blocks[number - 1]))


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder blocks in order: the backbone's `layers`, or else its first ModuleList whose
    length is the configuration's number of layers (GPT-2's `h`, OPT's `decoder.layers`)."""
    found = getattr(model.base_model, "layers", None)
    if isinstance(found, nn.ModuleList):
        return found
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise _unknown(model, "decoder blocks")


def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """The norm between the last block and the head."""
    found = getattr(model.base_model, "norm", None)
    if not isinstance(found, nn.Module):
        raise _unknown(model, "final norm")
    return found


def _attention(block: nn.Module) -> nn.Module:
    found = getattr(block, "self_attn", None)
    if not isinstance(found, nn.Module):
        raise _unknown(block, "attention")
    return found


def _unknown(module: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"Stillhouse cannot find the {what} in {type(module).__name__}",
        where="objective.terms",
        fix="use only terms on the output, which work for any architecture",
    )
