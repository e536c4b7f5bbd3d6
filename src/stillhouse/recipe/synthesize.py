"""The section `synthesize`: prompts, the teacher that answers them, and what is kept."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from stillhouse.recipe.section import Section

PromptFormat = Literal["auto", "text", "jsonl", "json", "csv"]


class PriceRecipe(Section):
    """US dollars for a million tokens."""

    input: float = Field(ge=0, strict=False)
    output: float = Field(ge=0, strict=False)


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
        64, gt=0, le=4096, description="Requests at once, at most; 429 answers lower it."
    )
    timeout: float = Field(120.0, gt=0, strict=False, description="Seconds for one whole answer.")
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="The endpoint's name of sampling.max_tokens."
    )

    @model_validator(mode="after")
    def _url_holds_no_secret(self) -> ApiTeacher:
        """Of the whole section: the error of a single key would show its value."""
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "base_url is written to files, so it may hold no user, password or query: put the "
                "key into the environment, and the variable's name into key_env"
            )
        return self


class LocalTeacher(Section):
    """A model in this process."""

    model: str | None = Field(None, description="As teacher.model; null: the recipe's teacher.")
    revision: str | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    batch: int = Field(32, gt=0, description="Answers written at once.")


class VllmEngine(Section):
    """How vLLM runs a model: on the GPUs of this machine or, with Ray, of several."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of the weights; auto: as the model's configuration says."
    )
    tensor_parallel: int = Field(1, gt=0, description="GPUs that share each layer.")
    pipeline_parallel: int = Field(
        1,
        gt=0,
        description="Groups of such GPUs, each with some of the layers; with ray, mostly one a "
        "machine.",
    )
    executor: Literal["auto", "mp", "ray"] = Field(
        "auto",
        description="ray: on a Ray cluster, which may span machines; mp: processes of this "
        "machine; auto: vLLM's choice.",
    )
    context: int | None = Field(
        None, gt=0, description="Tokens of a prompt with its answer; null: all the model can."
    )
    gpu_memory: float = Field(
        0.9, gt=0, le=1, strict=False, description="Share of each GPU's memory that vLLM may take."
    )
    batch: int = Field(
        1024, gt=0, description="Requests handed over at once, and committed together."
    )
    options: dict[str, Any] = Field(
        default={}, description="More arguments of vllm.LLM, e.g. {quantization: fp8}."
    )

    @field_validator("options")
    @classmethod
    def _has_no_key_of_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        ours = VLLM_ARGUMENTS & set(options)
        if ours:
            raise ValueError(f"{', '.join(sorted(ours))} cannot be set here: it has its own key")
        return options

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


VLLM_ARGUMENTS = frozenset(
    {
        "model",
        "tokenizer",
        "trust_remote_code",
        "dtype",
        "seed",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "distributed_executor_backend",
        "max_model_len",
        "gpu_memory_utilization",
    }
)
"""What Stillhouse gives vllm.LLM itself."""


class VllmTeacher(VllmEngine):
    """A model that vLLM runs in this process: many thousands of answers, large models."""

    model: str | None = Field(None, description="As teacher.model; null: the recipe's teacher.")
    revision: str | None = None


class TextTeacher(Section):
    """Who answers: `api`, `local` or `vllm`."""

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


class ExampleRecipe(Section):
    prompt: str
    answer: str


class CombineRecipe(Section):
    """Every template with every combination of values in its {names}."""

    templates: list[str] = Field(min_length=1, description='E.g. "Explain {topic} to {persona}."')
    values: dict[str, list[str]] = Field(
        default={}, description="E.g. topic: [tides, rainbows]; persona: [a child, an engineer]."
    )

    @model_validator(mode="after")
    def _names_have_values(self) -> CombineRecipe:
        for template in self.templates:
            try:
                found = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
            except ValueError as error:
                raise ValueError(f"the template {template!r} cannot be read: {error}") from None
            lacking = [name for name in found if not self.values.get(name)]
            if lacking:
                raise ValueError(f"the template {template!r} has {{{lacking[0]}}} and no values")
        return self


class WriteRecipe(Section):
    """The teacher writes the prompts: each combination is what a request for some of them says."""

    count: int = Field(gt=0, description="Different prompts to have.")
    each: int = Field(10, gt=0, description="Prompts to ask for in one request.")
    examples: int = Field(
        3, ge=0, description="Prompts of `path` that a request shows, others each time."
    )
    similar: float = Field(
        0.6,
        gt=0,
        le=1,
        strict=False,
        description="Leave out prompts this similar (Jaccard) to one before, or to one of `path`.",
    )
    temperature: float = Field(1.0, ge=0, strict=False)
    max_tokens: int = Field(1024, gt=0, description="Of one request's prompts together.")


class PromptsRecipe(Section):
    """From a file, or combined from templates, or written by the teacher."""

    path: str | None = Field(
        None,
        description="Text, CSV, JSONL or JSON; also logs of chat completions. With `write`: "
        "examples of what is to be written.",
    )
    combine: CombineRecipe | None = None
    write: WriteRecipe | None = None
    format: PromptFormat = Field("auto", description="auto: by the file's ending.")
    key: str = Field("prompt", description="The column or key that holds the prompt.")
    limit: int | None = Field(None, gt=0, description="Use at most this many prompts.")
    samples: int = Field(1, gt=0, description="Answers to each prompt.")
    system: str | None = Field(None, description="For prompts that bring no system prompt.")
    examples: list[ExampleRecipe] = Field(default=[], description="Put before every prompt.")
    student_sees: Literal["prompt", "system", "all"] = Field(
        "system",
        description="Of what stands around the prompt: nothing, the system prompt, or the "
        "examples too.",
    )

    @model_validator(mode="after")
    def _come_from_one_place(self) -> PromptsRecipe:
        if self.write is None and (self.path is None) == (self.combine is None):
            raise ValueError("give either path or combine")
        if self.write is not None and self.combine is None:
            raise ValueError("write needs combine, which says what is to be written")
        return self


class SamplingRecipe(Section):
    temperature: float | None = Field(
        1.0,
        ge=0,
        strict=False,
        description="0 is greedy; null (api): not sent, where an endpoint accepts only its own.",
    )
    top_p: float = Field(1.0, gt=0, le=1, strict=False)
    max_tokens: int = Field(512, gt=0, description="Of one answer, its reasoning included.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="api: ask for each token's log-probability and this many "
        "alternatives; kept in the journal.",
    )  # fmt: skip
    extra: dict[str, Any] = Field(
        default={}, description="api: sent as they are, e.g. {reasoning_effort: low}."
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
    """How a judge answers; one that reasons needs more tokens."""

    temperature: float | None = Field(
        0.0, ge=0, strict=False, description="0 is greedy; null (api): not sent."
    )
    max_tokens: int = Field(16, gt=0, description="Of one verdict, its reasoning included.")


class EvaluationTexts(Section):
    path: str = Field(description="Prompts that training must not see; as prompts.path.")
    format: PromptFormat = "auto"
    key: str = "prompt"
    ngram: int = Field(13, ge=2, description="Words in a row that a text may not share with them.")


class BudgetRecipe(Section):
    """Counts all answers of this recipe, whichever run paid for them."""

    max_usd: float | None = Field(None, ge=0, strict=False)
    max_tokens: int | None = Field(None, ge=0, description="Prompts and answers.")


class MajorityChoice(Section):
    """Of the answers to a prompt, those that say what most of them say (self-consistency)."""

    kind: Literal["majority"]
    pattern: str | None = Field(
        None,
        description="A regular expression; its last match in an answer is what is compared, or "
        "the first group of it. null: the whole answer.",
    )
    least: float = Field(
        0.0, ge=0, le=1, strict=False, description="Share of the answers that must agree."
    )
    keep: Literal["one", "all"] = Field(
        "one", description="Of those that agree: the first, or all."
    )


class LikelihoodChoice(Section):
    """The answer with the highest mean log-probability of its tokens under the teacher."""

    kind: Literal["likelihood"]


class JudgeChoice(Section):
    """The answer that a model likes best."""

    kind: Literal["judge"]
    teacher: TextTeacher = Field(description="The judge, as synthesize.teacher.")
    criteria: str = Field(
        "It is correct and complete, does what was asked, and is clearly written.",
        description="What a good answer is.",
    )
    compare: Literal["scores", "pairs"] = Field(
        "scores",
        description="scores: each answer gets 1 to 10; pairs: each pair is compared twice, in "
        "either order, n(n - 1) requests for n answers.",
    )
    sampling: VerdictSampling = VerdictSampling()
    budget: BudgetRecipe = Field(BudgetRecipe(), description="Of the judge alone.")

    @model_validator(mode="after")
    def _keys_fit_the_judge(self) -> JudgeChoice:
        check_budget(self.teacher.api, self.budget)
        check_sampling(self.teacher.api, self.sampling)
        return self


Choice = Annotated[
    MajorityChoice | LikelihoodChoice | JudgeChoice,
    Field(discriminator="kind"),
]


class FiltersRecipe(Section):
    """Empty answers always go. What a filter takes is in filtered.jsonl, with the reason."""

    truncated: bool = Field(True, description="Take answers that were cut off.")
    min_characters: int | None = Field(None, ge=0)
    max_characters: int | None = Field(None, gt=0)
    refusals: bool = Field(True, description="Take answers that begin like an English refusal.")
    require_pattern: str | None = Field(None, description="A regular expression to be found.")
    forbid_pattern: str | None = Field(None, description="A regular expression not to be found.")
    json_schema: str | None = Field(None, description="A file; answers must be JSON of its kind.")
    languages: list[str] | None = Field(
        None,
        min_length=1,
        description="ISO 639-1 codes, e.g. [en, de]; take answers that are surely in none of "
        "them. Needs stillhouse[language].",
    )
    best_of: Choice | None = Field(
        None, description="Of several answers to a prompt (prompts.samples), keep the best."
    )
    exact_duplicates: bool = Field(True, description="Take repeated pairs of prompt and answer.")
    near_duplicates: float | None = Field(
        None, gt=0, le=1, strict=False, description="Take pairs this similar (Jaccard), e.g. 0.8."
    )
    decontaminate: EvaluationTexts | None = None


class SynthesizeRecipe(Section):
    """Text from a teacher: a chat JSONL that `data` reads."""

    teacher: TextTeacher
    prompts: PromptsRecipe
    sampling: SamplingRecipe = SamplingRecipe()
    reasoning: Literal["strip", "keep"] = Field(
        "strip", description="What the teacher thinks in <think> before it answers."
    )
    filters: FiltersRecipe = FiltersRecipe()
    budget: BudgetRecipe = BudgetRecipe()
    journal: str | None = Field(
        None,
        description="SQLite file with every answer ever paid for; null: answers.sqlite beside "
        "the run folder, shared by all runs there.",
    )
    out: str = Field("synthetic.jsonl", description="The result; starts at the recipe's folder.")

    @model_validator(mode="after")
    def _keys_fit_the_teacher(self) -> SynthesizeRecipe:
        api = self.teacher.api
        check_budget(api, self.budget)
        check_sampling(api, self.sampling)
        check_samples(self.prompts.samples, self.sampling)
        if self.filters.best_of is not None and self.prompts.samples < 2:
            raise ValueError("filters.best_of chooses among several answers: set prompts.samples")
        return self


def check_sampling(api: ApiTeacher | None, sampling: SamplingRecipe) -> None:
    """Raises ValueError where a model in this process is given what only an API is."""
    if api is None and (sampling.extra or sampling.top_logprobs is not None):
        raise ValueError("sampling.extra and sampling.top_logprobs are for an api")
    if api is None and sampling.temperature is None:
        raise ValueError("a local model has no temperature of its own: give sampling.temperature")


def check_samples(samples: int, sampling: SamplingRecipe) -> None:
    """Raises ValueError where several answers would all be the same."""
    if samples > 1 and sampling.extra.get("temperature", sampling.temperature) == 0:
        raise ValueError("at temperature 0 all samples are the same: set sampling.temperature")


def check_budget(api: ApiTeacher | None, budget: BudgetRecipe) -> None:
    """Raises ValueError where there is nothing that the budget could limit."""
    limited = budget.max_usd is not None or budget.max_tokens is not None
    if api is None and limited:
        raise ValueError("a budget is for teacher.api: a local teacher costs time alone")
    if api is not None and api.price is None and budget.max_usd is not None:
        raise ValueError("max_usd needs teacher.api.price; or limit max_tokens")
