"""Requirements on the keys of config.json that define rotary embeddings.

transformers 5 reads `rope_parameters`, and older names alongside it only in part. If the two have
different values, programs differ in which one they use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.teachers.older_names import with_older_names

_OLDER = (
    "rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
    "partial_rotary_factor", "global_rope_theta", "local_rope_theta",
)  # fmt: skip
_POSITIVE = (
    "rope_theta", "factor", "attention_factor", "partial_rotary_factor", "beta_fast", "beta_slow",
    "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
    "original_max_position_embeddings",
)  # fmt: skip


def require_rope(keys: Mapping[str, Any], where: object = None) -> None:
    """Raise ModelError for keys of config.json that contradict each other, a scaling without a
    type, or numbers that are not positive. keys: the text model's."""
    rope = keys.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        _require_one_value(keys, where)
    for found in _ropes(keys):
        kind = found.get("rope_type", found.get("type"))
        if kind in (None, "default") and found.get("factor") not in (None, 1):
            raise ModelError(
                f"config.json scales rotary embeddings by a factor ({found['factor']}) without a "
                "rope_type, so transformers ignores the factor",
                where=where,
                fix="add the rope_type (linear, dynamic, yarn, ...), or remove the factor",
            )
    for found in ({key: keys.get(key) for key in _OLDER}, *_ropes(keys)):
        for key in found.keys() & set(_POSITIVE):
            if not _is_positive(found[key]):
                raise ModelError(
                    f"{key} must be a positive number, but is {found[key]!r}",
                    where=where,
                    fix="correct it, or copy the model's own config.json again",
                )


def _require_one_value(keys: Mapping[str, Any], where: object) -> None:
    try:
        older = with_older_names({key: keys[key] for key in keys.keys() - set(_OLDER)})
    except (KeyError, TypeError, AttributeError):
        return  # transformers' own error about rope_parameters says more
    older.setdefault("rope_scaling", {"rope_type": "default"})
    for key in _OLDER:
        if keys.get(key) and key in older and not _agree(keys[key], older[key]):
            raise ModelError(
                f"config.json has two different rotary embeddings: {key} is {keys[key]}, and "
                f"rope_parameters is {keys['rope_parameters']}",
                where=where,
                fix=f"write the values that the model was trained with into rope_parameters, and "
                f"remove {key}",
            )


def _agree(one: Any, other: Any) -> bool:
    """Whether two values are equal, or two scalings in all keys that they share."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return bool(one == other)
    kinds = [found.get("rope_type", found.get("type", "default")) for found in (one, other)]
    common = (one.keys() & other.keys()) - {"type", "rope_type"}
    same = all(one[key] == other[key] for key in common)
    # Qwen2-VL's `mrope` is the default rotation, applied to several positions.
    return same and (kinds[0] == kinds[1] or set(kinds) == {"default", "mrope"})


def _ropes(keys: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rotary embeddings, which can be separate for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = keys.get(key)
        if isinstance(found, dict):
            nested = [value for value in found.values() if isinstance(value, dict)]
            yield from nested or [found]


def _is_positive(value: Any) -> bool:
    """Whether a value, or each value of a list, is a positive number or None."""
    if isinstance(value, list):
        return all(map(_is_positive, value))
    if value is None:
        return True
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
