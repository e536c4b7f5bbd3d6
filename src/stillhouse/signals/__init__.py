"""What a student learns to match: the teacher's answer for given tokens.

An objective never learns where a signal came from: a model in memory, a server, or a store.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.signals.signal_types import (
        DenseSignal,
        FrozenHeadSignal,
        HiddenSignal,
        LMHead,
        LogitsSignal,
        SampledSignal,
        Signal,
        SparseSignal,
    )

__all__ = [
    "DenseSignal",
    "FrozenHeadSignal",
    "HiddenSignal",
    "LMHead",
    "LogitsSignal",
    "SampledSignal",
    "Signal",
    "SparseSignal",
]

_OWNERS = {
    "signal_types": [
        "DenseSignal",
        "FrozenHeadSignal",
        "HiddenSignal",
        "LMHead",
        "LogitsSignal",
        "SampledSignal",
        "Signal",
        "SparseSignal",
    ],
}


def __getattr__(name: str) -> Any:
    # Only what is used is imported: a recipe's types must not wait for torch.
    for module, names in _OWNERS.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
