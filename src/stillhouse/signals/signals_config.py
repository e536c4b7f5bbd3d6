"""The recipe's section for storing the teacher's signals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stillhouse.field_types import PathText, Share, ShareOrZero, check_url
from stillhouse.section import Section
from stillhouse.signals.encodings import (
    MOST_ENTRIES,
    EntryEncoding,
    Sampled,
    Stratified,
    Threshold,
    TopK,
    TopP,
)
from stillhouse.vllm_config import VllmEngine


class ThresholdSignals(Section):
    """Likely tokens exactly, and the others by unbiased draws. Harder positions get more of
    both."""

    kind: Literal["threshold"]
    bytes: Annotated[float, Field(ge=1, le=1024, allow_inf_nan=False)] = Field(
        36.0, description="Average bytes per token."
    )

    def encoding(self) -> EntryEncoding:
        """The encoding with an initial tau, which recording tunes to `bytes`."""
        return Threshold(0.02)


class TopKSignals(Section):
    """The k most likely tokens and the mass of all others, for nearly every divergence."""

    kind: Literal["top_k"]
    k: int = Field(32, gt=0, le=MOST_ENTRIES)

    def encoding(self) -> EntryEncoding:
        return TopK(self.k)


class TopPSignals(Section):
    """The smallest set of most likely tokens with mass p, and the mass of all others."""

    renamed: ClassVar[Mapping[str, str]] = {"most": "max_tokens"}

    kind: Literal["top_p"]
    p: Share = 0.98
    max_tokens: int = Field(
        64, gt=0, le=MOST_ENTRIES, description="Maximum number of tokens per position."
    )

    def encoding(self) -> EntryEncoding:
        return TopP(self.p, self.max_tokens)


class SampledSignals(Section):
    """Tokens drawn with replacement, and their counts (Sparse Logit Sampling)."""

    kind: Literal["sampled"]
    draws: int = Field(50, gt=0, le=MOST_ENTRIES)

    def encoding(self) -> EntryEncoding:
        return Sampled(self.draws)


class StratifiedSignals(Section):
    """The k most likely tokens exactly, and unbiased draws from the rest."""

    kind: Literal["stratified"]
    k: int = Field(8, gt=0, le=MOST_ENTRIES - 1)
    draws: int = Field(12, gt=0, le=MOST_ENTRIES - 1)

    def encoding(self) -> EntryEncoding:
        return Stratified(self.k, self.draws)

    @model_validator(mode="after")
    def _entries_fit(self) -> StratifiedSignals:
        if self.k + self.draws > MOST_ENTRIES:
            raise ValueError(
                f"k + draws must be at most {MOST_ENTRIES}, and is {self.k + self.draws}"
            )
        return self


class FrozenHeadSignals(Section):
    """All that forward KL needs if the student's head is frozen (train.freeze_head)."""

    kind: Literal["frozen_head"]


class HiddenSignals(Section):
    """The teacher's hidden states after the layers that the objective's terms use.

    With the last hidden states and the head, every divergence is exact, at any temperature.
    """

    kind: Literal["hidden"]


EntrySignals = ThresholdSignals | TopKSignals | TopPSignals | SampledSignals | StratifiedSignals
SignalEncoding = Annotated[
    EntrySignals | FrozenHeadSignals | HiddenSignals,
    Field(discriminator="kind"),
]


class SignalServer(Section):
    """A vLLM server for the teacher. With the encoding top_k, it must return log-probabilities of
    prompts; with the others, it must run a pooling model that returns hidden states."""

    base_url: str = Field(
        description="Base URL of an OpenAI-compatible API, such as http://localhost:8000/v1."
    )
    model: str = Field(description="The teacher's name on the server.")
    key_env: str | None = Field(
        None,
        description="Environment variable with the server's API key; null: no key.",
    )
    concurrency: int = Field(16, gt=0, le=4096, description="Maximum concurrent requests.")

    @model_validator(mode="after")
    def _holds_no_secret(self) -> SignalServer:
        check_url(self.base_url)
        return self


class AnswerSignals(Section):
    """The log-probabilities that come with an API's answers (synthesize.sampling.top_logprobs)."""

    mismatched: ShareOrZero = Field(
        0.02,
        description="Maximum share of answers that the API and the student's tokenizer tokenize "
        "differently; these are learned only from their text. More than this stops the run.",
    )


class SignalsRecipe(Section):
    """Stored signals: the teacher scores the text once, and training reads the stored signals."""

    encoding: SignalEncoding = ThresholdSignals(kind="threshold")
    server: SignalServer | None = Field(
        None,
        description="Score the text on this server, which returns log-probabilities of prompts for "
        "the encoding top_k and hidden states for the others.",
    )
    vllm: VllmEngine | None = Field(
        None, description="Score the text with vLLM on this machine, which returns hidden states."
    )
    answers: AnswerSignals | None = Field(
        None,
        description="Use the log-probabilities that the API returned in `synthesize`.",
    )
    store: PathText | None = Field(
        None,
        description="Finished store to read, e.g. from an earlier run; nothing is recorded.",
    )
    missing: Literal["error", "live"] = Field(
        "error",
        description="What to do about training text that `store` or `answers` lack. error: stop "
        "before training; live: score it each time it is trained on.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> SignalsRecipe:
        scored = self.server is not None or self.vllm is not None
        given = scored or self.encoding != ThresholdSignals(kind="threshold")
        if self.store is not None and given:
            raise ValueError(
                "a finished store is only read: remove encoding, server, and vllm, or store"
            )
        if self.answers is not None and (given or self.store is not None):
            raise ValueError(
                "answers have their own encoding: remove encoding, server, vllm, and store"
            )
        if self.server is not None and self.vllm is not None:
            raise ValueError("only one of server and vllm can score the text: remove one of them")
        if self.store is None and self.answers is None and self.missing == "live":
            raise ValueError(
                "missing applies only to an existing store or to answers: set store, or remove "
                "missing"
            )
        return self

    @property
    def top_tokens(self) -> bool:
        """Whether a server returns the most likely tokens instead of hidden states."""
        return self.server is not None and isinstance(self.encoding, TopKSignals)

    @property
    def needs_weights(self) -> bool:
        """Whether recording reads the teacher's weights, and not only its configuration and
        tokenizer."""
        if self.server is not None:
            return not isinstance(self.encoding, TopKSignals | HiddenSignals)
        return self.answers is None

    @property
    def local(self) -> bool:
        """Whether this process runs the teacher's forward passes."""
        return not (self.store or self.server or self.vllm or self.answers)
