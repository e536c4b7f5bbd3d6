"""The recipe section `train.on_policy`: text that the student writes during training."""

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
    """Prompts from a file, or from a data set of the Hugging Face Hub."""

    path: PathText | None = Field(
        None,
        description="Text, JSONL, JSON, CSV, TSV or Parquet, also compressed; logs of chat "
        "completions too.",
    )
    format: PromptFormat = Field("auto", description="auto: by the file's extension.")
    dataset: PathText | None = Field(
        None, description="A data set of the Hub, or a local folder that `datasets` can load."
    )
    config: str | None = None
    split: str = "train"
    key: str = Field("prompt", description="The column or key of the prompt.")
    limit: Tokens | None = Field(None, description="Use at most this many prompts.")
    system: str | None = Field(None, description="For prompts without a system prompt.")

    @model_validator(mode="after")
    def _come_from_one_place(self) -> OnPolicyPrompts:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        return self


class OnPolicyRecipe(Section):
    """The student writes answers, the teacher scores each of their tokens, and the student learns
    from that."""

    prompts: OnPolicyPrompts | None = Field(
        None,
        description="null: the chats of the training data, without their last answer, and the "
        "beginnings of its texts.",
    )
    share: ShareOrZero = Field(
        0.5, description="Share of the rows of each optimizer step that the student writes."
    )
    window: Steps = Field(
        4, description="Optimizer steps whose answers are generated at once; 1: strictly on-policy."
    )
    samples: SmallCount = Field(1, description="Answers to each prompt, one after the other.")
    temperature: SamplingTemperature = Field(1.0, description="Of the sampling; 0: greedy.")
    top_p: Share = Field(1.0, description="Nucleus sampling.")
    max_tokens: AnswerTokens = Field(128, description="Limit for one answer.")
    cut_off: Literal["keep", "drop"] = Field(
        "keep", description="Answers that reach the limit: learn from them, or not."
    )
    terms: list[LogitsTerm] = Field(
        default=[LogitsTerm(divergence="reverse_kl")],
        min_length=1,
        description="Divergences on the student's own text; their weighted sum is the loss.",
    )
    cold_start_tokens: TokensOrZero = Field(
        0, description="Supervised tokens of `data` to train on before the student writes."
    )
    teacher_tokens: TokensOrZero = Field(
        0, description="Tokens at the start of each answer that the teacher writes."
    )
    batch: Count = Field(32, description="generator.kind local: answers generated at once.")
    generator: RolloutsRecipe = Field(
        LocalRollouts(), description="What writes the answers: this process, or vLLM."
    )

    @model_validator(mode="after")
    def _terms_are_for_own_text(self) -> OnPolicyRecipe:
        for term in self.terms:
            if term.divergence == "cross_entropy":
                raise ValueError(
                    "cross_entropy with its own text would teach the student what it already does: "
                    "use a divergence from the teacher in on_policy.terms"
                )
            if term.layers is not None:
                raise ValueError("on_policy.terms are on the model's output: remove layers")
        require_different(self.terms)
        if not any(term.largest_weight for term in self.terms):
            raise ValueError("every term has weight 0, so nothing would be learned: raise one")
        if self.teacher_tokens >= self.max_tokens:
            raise ValueError(
                f"teacher_tokens ({self.teacher_tokens}) leave the student none of max_tokens "
                f"({self.max_tokens}): lower them"
            )
        return self
