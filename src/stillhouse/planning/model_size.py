"""The sizes of a model that decide what it takes, from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from stillhouse.account import count_parameters, expert_parameters
from stillhouse.teachers.planned_model import planned_model, shape_key


@dataclass(frozen=True)
class ModelSize:
    """Counts of parameters, each stored one once, and the two widths of the head.

    layer: of the largest decoder block. ends: of embeddings and head. active: as
    `account` counts them. experts: of all routed experts.
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
    """Of a model that does not exist yet. Raises ModelError as `planned_model`."""
    key = shape_key(config)
    if key not in _KNOWN:
        _KNOWN[key] = model_size(planned_model(config))
    return _KNOWN[key]


_KNOWN: dict[str, ModelSize] = {}


def model_size(model: Any) -> ModelSize:
    """Of a causal language model, which may be on the meta device."""
    found = count_parameters(model)
    blocks = _blocks(model)
    ends = found.total - found.non_embedding
    head = model.get_output_embeddings().weight
    vocabulary, hidden = head.shape
    return ModelSize(
        parameters=found.total,
        active=found.active,
        layer=max(_count(block) for block in blocks),
        ends=ends,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=len(blocks),
        tied=head is model.get_input_embeddings().weight,
        experts=expert_parameters(model),
    )


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the list of modules that holds the most."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=_count)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
