"""Numbers and plain values as text. A non-breaking space joins a number and its unit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

NBSP = "\u00a0"
DASH = "–"

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PROPER = {"ffn": "FFN", "kl": "KL", "cpu": "CPU", "gpu": "GPU", "gpus": "GPUs"}


def digits(value: float, significant: int = 3) -> str:
    """Format to `significant` digits, with thousands separators and without an exponent."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    exponent = int(f"{value:.{significant - 1}e}".split("e")[1])  # after rounding: 9.999 is 10.0
    places = max(0, significant - 1 - exponent)
    return f"{value:,.{places}f}"


def tiny(value: float) -> str:
    """Like `digits`, but use a power of ten below 0.0001."""
    if value != 0 and math.isfinite(value) and abs(value) < 1e-4:
        return power_of_ten(value)
    return digits(value)


def power_of_ten(value: float) -> str:
    """Format as a power of ten: 1.23 × 10⁴."""
    if value == 0 or not math.isfinite(value):
        return digits(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}{NBSP}×{NBSP}10{superscript(int(exponent))}"


def superscript(number: int) -> str:
    return str(number).translate(_SUPERSCRIPT)


def count(value: float) -> str:
    """Format a number of parameters or tokens: 134.5M, 60,416."""
    for size, unit in _COUNTS:
        if value >= size:
            return f"{digits(value / size, 4)}{unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Format bytes in decimal units: 1.23 GB."""
    for step, unit in _BYTES:
        if value >= step:
            return f"{digits(value / step)}{NBSP}{unit}"
    return f"{value:,.0f}{NBSP}bytes"


def percent(share: float, places: int = 0) -> str:
    """Format a fraction as a percentage: 0.8 becomes 80%."""
    return f"{100 * share:,.{places}f}%" if math.isfinite(share) else "not finite"


def times(value: float) -> str:
    return f"{digits(value)}{NBSP}×"


def seconds(value: float) -> str:
    """Format a duration: 4.2 s, 6 min 12 s, 3 h 05 min."""
    if value < 59.5:
        return f"{digits(value, 2) if value < 10 else format(value, '.0f')}{NBSP}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}{NBSP}h {minutes:02d}{NBSP}min"


def flops(value: float) -> str:
    return power_of_ten(value) if value else DASH


def label(key: str) -> str:
    """Turn a dictionary key into a label: ffn_size becomes FFN size."""
    words = key.replace("_", " ").replace("heldout", "held-out").strip()
    words = words[:1].upper() + words[1:]
    return " ".join(_PROPER.get(word.lower(), word) for word in words.split(" "))


def describe(value: Any) -> str:
    """Format any JSON value on one line; consecutive integers become ranges."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return tiny(value)
    if isinstance(value, dict):
        return ", ".join(f"{label(str(key))}: {describe(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        if value and all(type(item) is int for item in value):
            return _ranges(list(value))
        return ", ".join(describe(item) for item in value) or "none"
    return str(value)


def _ranges(numbers: list[int]) -> str:
    """Format [0, 1, 2, 5] as 0–2, 5; two consecutive integers are not joined."""
    breaks = [at for at, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    runs = [numbers[start:end] for start, end in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(
        f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )
