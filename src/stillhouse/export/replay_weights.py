"""Check that an export has exactly the weights of the model that transformers loads from it.

`replay.py` loads this file by its path, so it imports nothing from Stillhouse.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import core_model_loading


def weight_problems(model: Any, info: dict[str, Any], exported: Path) -> list[str]:
    """Describe missing and unexpected weights, and weights with a different shape."""
    stored: set[str] = set()
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= {_parameter(name) for name in tensors.keys()}  # noqa: SIM118
    extra = {*info["unexpected_keys"], *(stored - _saved_names(model))}
    found = {
        "missing": {*info["missing_keys"]},
        "unexpected": extra,
        "of a different shape": {str(key[0]) for key in info["mismatched_keys"]},
    }
    return [f"{what}: {', '.join(sorted(names)[:4])}" for what, names in found.items() if names]


def _saved_names(model: Any) -> set[str]:
    """The names under which transformers saves the model's tensors. Version 5 stores some of them
    under version 4's names, such as those of single experts, which it keeps in one tensor."""
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    if getattr(model, "hf_quantizer", None) is not None:
        return set(tensors)
    return {*tensors, *core_model_loading.revert_weight_conversion(model, tensors)}


def _parameter(stored: str) -> str:
    """The parameter that a stored tensor belongs to: torchao stores x.weight as several tensors,
    such as x._weight_scale."""
    return re.sub(r"\._weight_(qdata|scale|zero_point)$", ".weight", stored)
