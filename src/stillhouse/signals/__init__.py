"""What a student learns to match: the teacher's answer for given tokens.

An objective never learns where a signal came from: a model in memory, a server, or a store.
"""

from stillhouse.signals.types import (
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
