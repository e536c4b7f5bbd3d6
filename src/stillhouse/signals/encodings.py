"""Encodings of a teacher's distribution in a store, one frozen dataclass each.

Each defines what it keeps per row, the signal that it is read back as (`signal`), the divergences
that this signal supports (`serves`), and whether it estimates the teacher's probabilities without
bias (`bias`). These texts are part of a manifest and its digest, so they must not change. Ids take
`id_bytes` bytes: 2 if the vocabulary has at most 65,536 tokens, otherwise 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from stillhouse.errors import SignalError

MOST_ENTRIES = 254
"""Maximum number of entries in a row, whose count is stored in one byte."""
BUCKETED = "every divergence except adaptive_kl"
FORWARD_ONLY = "forward_kl"
UNITS = {1: 255, 2: 65535}
"""A probability of n bytes is a multiple of 1/UNITS[n]."""


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens: id and log-probability (float16), and the mass of all others.

    With `tail: false`, the k probabilities are normalized to sum to 1 when they are read. This is
    the usual baseline, whose error does not average out.
    """

    k: int
    tail: bool = True

    kind: ClassVar[str] = "top_k"
    draws_per_row: ClassVar[int] = 0

    @property
    def signal(self) -> str:
        return "SparseSignal" if self.tail else "SampledSignal"

    @property
    def serves(self) -> str:
        return BUCKETED if self.tail else FORWARD_ONLY

    @property
    def bias(self) -> str:
        if self.tail:
            return "none within its buckets; tokens of the tail are not distinguished"
        return "biased: tokens below the k-th count as impossible, all others as likelier"

    def __post_init__(self) -> None:
        _within("top_k.k", self.k, 1, MOST_ENTRIES)


@dataclass(frozen=True)
class TopP:
    """The smallest set of most likely tokens whose mass reaches p, but at most `most` tokens,
    stored as in `TopK`."""

    p: float
    most: int = 64

    kind: ClassVar[str] = "top_p"
    signal: ClassVar[str] = "SparseSignal"
    serves: ClassVar[str] = BUCKETED
    bias: ClassVar[str] = "none within its buckets; tokens of the tail are not distinguished"
    draws_per_row: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _within("top_p.p", self.p, 0.0, 1.0)
        _within("top_p.most", self.most, 1, MOST_ENTRIES)


@dataclass(frozen=True)
class Sampled:
    """The distinct ids and counts of `draws` tokens drawn with replacement from q ∝ p^exponent.

    Sparse Logit Sampling (Anshumann et al. 2025, arXiv 2503.16870). With an exponent of 1, a count
    is one byte. Otherwise each id has count · p/q as a float16. Rows are normalized when they are
    read, so the estimate is a ratio: consistent, with a bias of order 1/draws.
    """

    draws: int
    exponent: float = 1.0

    kind: ClassVar[str] = "sampled"
    signal: ClassVar[str] = "SampledSignal"
    serves: ClassVar[str] = FORWARD_ONLY

    @property
    def draws_per_row(self) -> int:
        return self.draws

    @property
    def bias(self) -> str:
        return "unbiased" if self.exponent == 1.0 else "biased by order 1/draws: rows sum to 1"

    def __post_init__(self) -> None:
        _within("sampled.draws", self.draws, 1, MOST_ENTRIES)
        _within("sampled.exponent", self.exponent, 0.1, 2.0)


@dataclass(frozen=True)
class Stratified:
    """The k most likely tokens with their probabilities, and systematic draws from the rest.

    Each draw has a weight of (mass of the rest) / draws. That mass is 1 minus the stored
    probabilities, so only a draw's id is stored.
    """

    k: int
    draws: int
    probability_bytes: Literal[1, 2] = 1

    kind: ClassVar[str] = "stratified"
    signal: ClassVar[str] = "SampledSignal"
    serves: ClassVar[str] = FORWARD_ONLY
    bias: ClassVar[str] = "unbiased"
    draws_per_row: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _within("stratified.k", self.k, 1, MOST_ENTRIES)
        _within("stratified.draws", self.draws, 1, MOST_ENTRIES - self.k)
        _probability_bytes(self.probability_bytes)


@dataclass(frozen=True)
class Threshold:
    """Every token of probability ≥ tau exactly, and systematic draws from the rest.

    The rest, of mass T, gets max(1, ⌊T/tau⌋) draws of weight T / draws, so a position with a heavy
    tail gets more draws, and no token is drawn twice. A single tau for the whole store minimizes
    the total variance for a given number of entries (see docs/signal-store.md). `tune_threshold`
    finds the tau for a size.
    """

    tau: float
    probability_bytes: Literal[1, 2] = 1

    kind: ClassVar[str] = "threshold"
    signal: ClassVar[str] = "SampledSignal"
    serves: ClassVar[str] = FORWARD_ONLY
    bias: ClassVar[str] = "unbiased"
    draws_per_row: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _within("threshold.tau", self.tau, 1 / (MOST_ENTRIES - 1), 1.0)
        _probability_bytes(self.probability_bytes)


@dataclass(frozen=True)
class AnswerChunks:
    """Log-likelihoods of an answer's chunks (float16), from an API with a different tokenizer.

    A row with an entry begins a chunk if the entry has a value, and text outside of chunks if it
    has none. Rows without entries continue it. The entry's id is the student's token.
    """

    kind: ClassVar[str] = "chunks"
    signal: ClassVar[str] = "ChunkSignal"
    serves: ClassVar[str] = "terms on chunks"
    bias: ClassVar[str] = "rounding to float16; text in no chunk has no loss"
    draws_per_row: ClassVar[int] = 0


@dataclass(frozen=True)
class FrozenHead:
    """Wᵀp in bfloat16 for a student's frozen head W [V, width], and Σ p log p.

    These determine the forward KL exactly, up to rounding. A row takes 2 · width + 4 bytes.
    """

    width: int

    kind: ClassVar[str] = "frozen_head"
    signal: ClassVar[str] = "FrozenHeadSignal"
    serves: ClassVar[str] = "forward_kl of a student whose head is frozen"
    bias: ClassVar[str] = "exact up to bfloat16"
    draws_per_row: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _within("frozen_head.width", self.width, 1, 2**24)


@dataclass(frozen=True)
class Hidden:
    """The hidden states after the given layers, `width` numbers each, in bfloat16."""

    layers: tuple[int, ...]
    width: int

    kind: ClassVar[str] = "hidden"
    signal: ClassVar[str] = "HiddenSignal"
    serves: ClassVar[str] = "losses on these hidden states; of the last, every divergence"
    bias: ClassVar[str] = "exact up to bfloat16"
    draws_per_row: ClassVar[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists only
        _within("hidden.width", self.width, 1, 2**24)
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise SignalError(f"hidden.layers must be different layers, not {self.layers}")


EntryEncoding = TopK | TopP | Sampled | Stratified | Threshold
DenseEncoding = FrozenHead | Hidden
Encoding = EntryEncoding | AnswerChunks | DenseEncoding
ENCODINGS: Mapping[str, type[Encoding]] = {each.kind: each for each in get_args(Encoding)}


def encoding_to_json(encoding: Encoding) -> dict[str, Any]:
    """The encoding's kind and parameters, in JSON types."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(encoding).items()}
    return {"kind": encoding.kind, **values}


def encoding_from_json(raw: Mapping[str, Any]) -> Encoding:
    """The inverse of `encoding_to_json`. Raises SignalError: an unknown kind or parameter."""
    values = dict(raw)
    kind = values.pop("kind", None)
    if kind not in ENCODINGS:
        raise SignalError(f"unknown encoding {kind!r}", fix=f"use one of {', '.join(ENCODINGS)}")
    try:
        return ENCODINGS[kind](**values)
    except TypeError as error:
        known = [field.name for field in fields(ENCODINGS[kind])]
        raise SignalError(
            f"{kind} does not have the parameters {sorted(values)}",
            fix=f"its parameters are {', '.join(known)}",
        ) from error


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SignalError(f"{name} must be from {low:g} to {high:g}, and is {value:g}")


def _probability_bytes(value: int) -> None:
    if value not in UNITS:
        raise SignalError(f"probability_bytes must be 1 or 2, and is {value}")
