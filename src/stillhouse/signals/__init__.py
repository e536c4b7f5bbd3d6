"""Signals: a teacher's distributions for given tokens, which a student learns to match.

Objectives do not depend on where a signal comes from: a model in memory, a server, or a store.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.signals.signal_types import (
        ChunkSignal,
        DenseSignal,
        Fold,
        FoldedSignal,
        FrozenHeadSignal,
        HiddenSignal,
        LMHead,
        LogitsSignal,
        SampledSignal,
        Signal,
        SparseSignal,
    )

__all__ = [
    "ChunkSignal",
    "DenseSignal",
    "Fold",
    "FoldedSignal",
    "FrozenHeadSignal",
    "HiddenSignal",
    "LMHead",
    "LogitsSignal",
    "SampledSignal",
    "Signal",
    "SparseSignal",
]


def __getattr__(name: str) -> Any:
    # Import lazily, since reading a recipe must not wait for torch.
    if name in __all__:
        return getattr(import_module(f"{__name__}.signal_types"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
