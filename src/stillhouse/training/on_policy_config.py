"""The recipe section `train.on_policy`: text that the student generates during training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.field_types import (
    AnswerTokens,
    Count,
    PathText,
    SamplingTemperature,
    Share,
    ShareOrZero,
    SmallCount,
    Steps,
    Tokens,
    TokensOrZero,
)
from stillhouse.generation.rollout_config import LocalRollouts, RolloutsRecipe
from stillhouse.objectives.objective_config import LogitsTerm, require_different
from stillhouse.section import Section
from stillhouse.synthesis.synthesize_config import PromptFormat


class OnPolicyPrompts(Section):
    """Prompts from a file, or from a dataset on the Hugging Face Hub."""

    path: PathText | None = Field(
        None,
        description="Text, JSONL, JSON, CSV, TSV, or Parquet file, optionally compressed, or a log "
        "of chat completions.",
    )
    format: PromptFormat = Field("auto", description="auto: by the file's extension.")
    dataset: PathText | None = Field(
        None, description="Dataset on the Hub, or a local folder that `datasets` can load."
    )
    config: str | None = None
    split: str = "train"
    key: str = Field("prompt", description="Column or key with the prompt.")
    limit: Tokens | None = Field(None, description="Maximum number of prompts to use.")
    system: str | None = Field(None, description="System prompt for prompts that do not have one.")

    @model_validator(mode="after")
    def _come_from_one_place(self) -> OnPolicyPrompts:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("set either path or dataset")
        return self


class OnPolicyRecipe(Section):
    """On-policy distillation: the student generates answers, the teacher scores each token of them,
    and the student learns from these scores."""

    prompts: OnPolicyPrompts | None = Field(
        None,
        description="Prompts for the student; null: the chats in the training data, without their "
        "last answer, and the beginnings of its texts.",
    )
    share: ShareOrZero = Field(
        0.5, description="Share of each optimizer step's rows that the student generates."
    )
    window: Steps = Field(
        4,
        description="Optimizer steps for which answers are generated at once; 1: strictly "
        "on-policy.",
    )
    samples: SmallCount = Field(1, description="Answers to generate for each prompt.")
    temperature: SamplingTemperature = Field(1.0, description="Sampling temperature; 0: greedy.")
    top_p: Share = Field(1.0, description="Nucleus sampling: keep tokens up to this probability.")
    max_tokens: AnswerTokens = Field(128, description="Maximum tokens of an answer.")
    cut_off: Literal["keep", "drop"] = Field(
        "keep", description="Whether to learn from answers that reach max_tokens."
    )
    terms: list[LogitsTerm] = Field(
        default=[LogitsTerm(divergence="reverse_kl")],
        min_length=1,
        description="Divergences on the student's own text; their weighted sum is the loss.",
    )
    cold_start_tokens: TokensOrZero = Field(
        0, description="Supervised tokens of `data` to train on before the student generates."
    )
    teacher_tokens: TokensOrZero = Field(
        0, description="Tokens at the start of each answer that the teacher generates."
    )
    batch: Count = Field(32, description="Answers generated at once, with generator.kind: local.")
    generator: RolloutsRecipe = Field(
        LocalRollouts(), description="Where answers are generated: in this process, or by vLLM."
    )

    @model_validator(mode="after")
    def _terms_are_for_own_text(self) -> OnPolicyRecipe:
        for term in self.terms:
            if term.divergence == "cross_entropy":
                raise ValueError(
                    "cross_entropy on its own text teaches the student only what it already does: "
                    "use a divergence from the teacher in on_policy.terms"
                )
            if term.layers is not None:
                raise ValueError("on_policy.terms apply only to the model's output: remove layers")
        require_different(self.terms)
        if not any(term.largest_weight for term in self.terms):
            raise ValueError("every term has weight 0, so nothing would be learned: raise one")
        if self.teacher_tokens >= self.max_tokens:
            raise ValueError(
                f"teacher_tokens ({self.teacher_tokens}) must be less than max_tokens "
                f"({self.max_tokens}), to leave tokens for the student"
            )
        return self
