"""Generators: token ids in; token ids, log-probabilities and a stop reason out.

`LocalGenerator` runs a model on this device, `VllmGenerator` an engine that batches by itself.
`TextGenerator` puts text around either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TokenPrompt:
    """Tokens to continue, and how.

    max_tokens: of the continuation. temperature: 0 is greedy. top_p: nucleus sampling. seed: of the
    draws; equal prompts with equal seeds have equal continuations. logprobs: whether they are
    returned.
    """

    ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False


@dataclass(frozen=True)
class Continuation:
    """The generated tokens.

    ids: the new tokens, the one that ends the sequence included. stop: `stop` (an end token was
    written), `length` (max_tokens are), or another reason of the engine's. logprobs: of the new
    tokens under the model, at temperature 1; None where not requested. seconds: from reading the
    prompt to the last token. text: the tokens as the engine decoded them; None if it did not.
    """

    ids: Sequence[int]
    stop: str
    logprobs: Sequence[float] | None = None
    seconds: float = 0.0
    text: str | None = None


class Generator(Protocol):
    """window: maximum tokens of prompt and continuation; 0 if unknown."""

    @property
    def window(self) -> int: ...

    def generate(self, prompts: Iterable[TokenPrompt]) -> Iterator[tuple[int, Continuation]]:
        """Yield each prompt's number (from 0) with its continuation, as they finish.

        `prompts` are read lazily, some batches ahead. Raises ModelError if the engine fails.
        """
        ...
