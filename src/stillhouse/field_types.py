"""Types that a recipe's sections share: bounded numbers, and paths.

Every number is finite and bounded: a value outside its bounds would overflow, take forever, or
have no effect.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

MOST_TOKENS = 2**53
"""Every integer up to this one is exact in float64, which JSON and the estimates use."""


def _float(low: float, high: float) -> Any:
    return Field(ge=low, le=high, allow_inf_nan=False)


def _above_zero(high: float) -> Any:
    return Field(gt=0, le=high, allow_inf_nan=False)


def _int(low: int, high: int) -> Any:
    return Field(ge=low, le=high)


def _at_least(least: float, *, or_zero: bool = False) -> AfterValidator:
    def check(value: float) -> float:
        if 0 < value < least:
            raise ValueError(f"it must be {'0, or ' if or_zero else ''}at least {least:g}")
        return value

    return AfterValidator(check)


# --- integers --------------------------------------------------------------------------------

Seed = Annotated[int, _int(0, 2**32 - 1)]
"""NumPy's legacy generator, which transformers and lm-eval seed, accepts at most 32 bits."""
Tokens = Annotated[int, _int(1, MOST_TOKENS)]
"""A number of tokens, rows, characters, or bytes."""
TokensOrZero = Annotated[int, _int(0, MOST_TOKENS)]
Context = Annotated[int, _int(8, 2**24)]
"""Tokens of one window."""
AnswerTokens = Annotated[int, _int(1, 2**24)]
"""The maximum number of tokens in one answer."""
Steps = Annotated[int, _int(1, 2**31 - 1)]
"""Optimizer steps."""
Count = Annotated[int, _int(1, 10**6)]
"""A small count: a batch, candidates, GPUs, n-grams."""
CountOrZero = Annotated[int, _int(0, 10**6)]
SmallCount = Annotated[int, _int(1, 10_000)]
"""A number of layers, heads, experts, or answers per prompt; or a layer's number, from 1."""
Width = Annotated[int, _int(1, 2**24)]
"""A model dimension: a layer's width or the vocabulary size."""
WholeNumber = Annotated[int, _int(-MOST_TOKENS, MOST_TOKENS)]

# --- floating-point numbers ------------------------------------------------------------------

LearningRate = Annotated[float, _above_zero(10.0), _at_least(1e-12)]
Epochs = Annotated[float, _above_zero(1e6), _at_least(1e-6)]
WeightDecay = Annotated[float, _float(0.0, 10.0), _at_least(1e-12, or_zero=True)]
GradientNorm = Annotated[float, _above_zero(1e9), _at_least(1e-9)]
"""The largest value is equivalent to no clipping."""
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""A decay rate of Adam's moments."""
Weight = Annotated[float, _float(0.0, 1e6), _at_least(1e-12, or_zero=True)]
"""The weight of a loss term."""
Temperature = Annotated[float, _above_zero(100.0), _at_least(1e-3)]
"""Divides logits in a loss."""
SamplingTemperature = Annotated[float, _float(0.0, 100.0), _at_least(1e-3, or_zero=True)]
"""0 means greedy decoding."""
Share = Annotated[float, _above_zero(1.0), _at_least(1e-6)]
"""A fraction above 0 and up to 1."""
PartialShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), _at_least(1e-6)]
"""A fraction above 0 and below 1."""
PartialShareOrZero = Annotated[
    float, Field(ge=0, lt=1, allow_inf_nan=False), _at_least(1e-6, or_zero=True)
]
"""A fraction from 0 to below 1."""
ShareOrZero = Annotated[float, _float(0.0, 1.0), _at_least(1e-6, or_zero=True)]
"""A fraction from 0 to 1."""
Similarity = Annotated[float, _above_zero(1.0), _at_least(0.01)]
"""The Jaccard similarity of two texts."""
Parameter = Annotated[float, _float(0.0, 10.0), _at_least(1e-6, or_zero=True)]
"""A parameter of a divergence."""
FiniteNumber = Annotated[float, _float(-1e38, 1e38)]
"""A number within float32's range."""
Divergence = Annotated[float, _above_zero(1e3), _at_least(1e-15)]
"""A limit on a KL divergence, in nats."""
Usd = Annotated[float, _float(0.0, 1e9), _at_least(1e-12, or_zero=True)]
"""An amount in US dollars, or a price per million tokens."""
Seconds = Annotated[float, _above_zero(604_800.0), _at_least(1e-3)]
"""A duration of up to a week."""

# --- text ------------------------------------------------------------------------------------


def usable_path(path: str) -> str:
    """Replace `~` in a path with the home folder. Raises ValueError if no file system allows the
    path."""
    if "\0" in path:
        raise ValueError("a path cannot contain the character NUL")
    written = path.encode("utf-8", "surrogatepass")
    if len(written) > 4000 or max(map(len, written.split(b"/"))) > 255:
        raise ValueError("the path is too long: at most 4,000 bytes, and 255 between slashes")
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = Path(path).parts[0]
        raise ValueError(f"there is no home folder {user}: write the full path")
    return found


def check_url(url: str) -> None:
    """Raise ValueError if this is not an API's base URL, or if it may contain a secret. The message
    leaves out the URL. Call this in a section's validator: an error about a single recipe key would
    show its value."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(character.isspace() or character < " " for character in url):
        raise ValueError(
            "base_url must be http:// or https://, a host, and optionally a port from 1 to 65535: "
            "for example http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "base_url is written to files, so it must not contain a user, a password, or a query: "
            "put the key into an environment variable, and set key_env to its name"
        )


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("it must contain only text, finite numbers, lists, and mappings") from None
    return values


PathText = Annotated[str, AfterValidator(usable_path)]
"""The path or name of a model or dataset; paths are relative to the recipe's folder."""
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""The name of a run or a family member, and of its folder."""
JsonValues = Annotated[dict[str, Any], AfterValidator(_json_values)]
