"""The sizes of a model that determine its memory and compute, from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from stillhouse.account import count_parameters, expert_parameters
from stillhouse.teachers.planned_model import planned_model, shape_key


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts, with each stored parameter counted once, and the shape of the LM head.

    parameters: all. active: counted as in `account`. layer: in the largest decoder block. ends: in
    the embeddings and the LM head. experts: in all routed experts.
    """

    parameters: int
    active: int
    layer: int
    ends: int
    vocabulary: int
    hidden: int
    layers: int
    tied: bool
    experts: int = 0

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden


def config_size(config: Any) -> ModelSize:
    """Compute the sizes of a causal language model from its configuration. Its decoder blocks are
    the module list with the most parameters. Raises ModelError like `planned_model`."""
    key = shape_key(config)
    if key in _KNOWN:
        return _KNOWN[key]
    model: Any = planned_model(config)
    found = count_parameters(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=_count)
    head = model.get_output_embeddings().weight
    vocabulary, hidden = head.shape
    _KNOWN[key] = ModelSize(
        parameters=found.total,
        active=found.active,
        layer=max(_count(block) for block in blocks),
        ends=found.total - found.non_embedding,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=len(blocks),
        tied=head is model.get_input_embeddings().weight,
        experts=expert_parameters(model),
    )
    return _KNOWN[key]


_KNOWN: dict[str, ModelSize] = {}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
