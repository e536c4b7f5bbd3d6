"""Models that answer requests, behind an API or on this machine; answers go to the journal."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.errors import EndpointError
from stillhouse.event_loop import run_stoppable
from stillhouse.generation.budget import FREE, Budget, Price, Spending
from stillhouse.generation.client import Client
from stillhouse.generation.estimate import Estimate
from stillhouse.generation.generation_config import (
    ApiTeacher,
    BudgetRecipe,
    LocalTeacher,
    SamplingRecipe,
    TextTeacher,
    VllmTeacher,
)
from stillhouse.generation.helpers import Helpers
from stillhouse.generation.journal import Journal
from stillhouse.generation.local_generator import open_local
from stillhouse.generation.request import Answer, Message, Outcome, Request, Requests, endpoint_of
from stillhouse.generation.request_pool import Pool, Tally
from stillhouse.generation.vllm_engine import opened
from stillhouse.hardware import choose_precision
from stillhouse.progress import bar, note
from stillhouse.teachers.model_source import ModelSource, resolve_model

WAITING = "waiting for requests in flight; press Ctrl-C again to abandon them"


@dataclass(frozen=True)
class DefaultModel:
    """The recipe's teacher, which a text teacher uses if it names no model.

    base: the recipe's folder, where relative paths start. helpers: other processes that also answer
    requests, if the model is local.
    """

    base: Path
    name: str = ""
    revision: str | None = None
    trusted: bool = False
    helpers: Helpers | None = None


def text_source(
    section: TextTeacher,
    sampling: SamplingRecipe,
    budget: BudgetRecipe,
    default: DefaultModel,
    seed: int,
    *,
    logprobs: bool = False,
) -> TextSource:
    """The text teacher of a section. logprobs: request the answers' log-probabilities.

    Raises ModelError.
    """
    if section.api is not None:
        api = section.api
        return ApiText(api, _parameters(sampling, api.token_limit, logprobs), budget)
    assert section.here is not None
    parameters = _parameters(sampling, "max_tokens", logprobs)
    return LocalText(section.here, parameters, default, seed)


def _parameters(section: SamplingRecipe, token_limit: str, logprobs: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    if section.temperature is not None:
        parameters["temperature"] = section.temperature
    parameters |= {token_limit: section.max_tokens, **section.extra}
    if section.top_p < 1:
        parameters["top_p"] = section.top_p
    if section.top_logprobs is not None:
        parameters |= {"logprobs": True, "top_logprobs": section.top_logprobs}
    elif logprobs:
        parameters["logprobs"] = True
    return parameters


class ApiText:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, api: ApiTeacher, parameters: dict[str, Any], budget: BudgetRecipe) -> None:
        self.api, self.parameters, self.budget = api, parameters, budget
        self.price = Price(api.price.input, api.price.output) if api.price else None
        self.endpoint = endpoint_of(api.base_url)

    def request(self, messages: tuple[Message, ...], sample: int = 0) -> Request:
        return Request(self.endpoint, self.api.model, messages, self.parameters, sample)

    def send(
        self, requests: Requests, journal: Journal, estimate: Estimate, spent: Spending
    ) -> Tally:
        """Send the requests that have no answer in the journal.

        estimate: of `requests`. spent: the part of the budget that is used. Raises EndpointError if
        no request can succeed.
        """
        budget = Budget(self.budget.max_usd, self.budget.max_tokens)
        budget.spent = spent
        if self.price is None:
            note("the cost is unknown, because api.price is not set")
        with bar(f"requests to {self.api.model}", estimate.requests, "requests") as advance:
            work = self._answer_all(requests, journal, budget, advance)
            tally = run_stoppable(work, partial(note, WAITING))
        if tally.failed and not tally.answered and estimate.missing == estimate.requests:
            *_, (_, kind, reason) = journal.failures()
            raise EndpointError(
                f"no request was answered; the last failure: {kind}: {reason}",
                where=self.endpoint,
                fix="remove the cause, then repeat the command",
            )
        return tally

    async def _answer_all(
        self, requests: Requests, journal: Journal, budget: Budget, advance: Callable[[int], None]
    ) -> Tally:
        api = self.api
        async with Client(
            api.base_url,
            api.model,
            key_env=api.key_env,
            price=self.price,
            timeout=api.timeout,
            connections=api.concurrency,
        ) as client:
            pool = Pool(
                client.send,
                journal,
                budget,
                concurrency=api.concurrency,
                price=self.price,
                advance=advance,
            )
            return await pool.answer_all(requests())


class LocalText:
    """A model on this machine, run in this process or by vLLM; it costs only time.

    source: the model; for a Hub model, only the files that identify it are downloaded before it
    answers.
    """

    price = FREE

    def __init__(
        self,
        own: LocalTeacher | VllmTeacher,
        parameters: dict[str, Any],
        default: DefaultModel,
        seed: int,
    ) -> None:
        self.own, self.default, self.seed = own, default, seed
        self.source = self._resolved(weights=False)
        self.parameters = {**parameters, "seed": seed, **_numerics(own)}

    def _resolved(self, *, weights: bool) -> ModelSource:
        own, default = self.own, self.default
        return resolve_model(
            own.model or default.name,
            revision=default.revision if own.model is None else own.revision,
            base=default.base,
            weights=weights,
            trusted=default.trusted,
        )

    @property
    def runs_here(self) -> bool:
        """Whether the model runs in this process, rather than in vLLM, which uses all GPUs."""
        return isinstance(self.own, LocalTeacher)

    def request(self, messages: tuple[Message, ...], sample: int = 0) -> Request:
        endpoint = "local" if self.runs_here else "vllm"
        return Request(endpoint, self.source.fingerprint, messages, self.parameters, sample)

    def send(
        self, requests: Requests, journal: Journal, estimate: Estimate, spent: Spending
    ) -> Tally:
        """Like `ApiText.send`, but without a budget. Raises ModelError."""
        tally = Tally()
        on_its_way: set[str] = set()
        handed_over: deque[tuple[str, Future[None]]] = deque()
        one_at_a_time = threading.Lock()

        def settle() -> None:
            """Wait until all answers so far are on disk."""
            while handed_over:
                key, saved = handed_over.popleft()
                saved.result()
                on_its_way.discard(key)

        def unanswered() -> Iterator[Request]:
            # A generator reads a batch before it starts on it; by then, the last one is on disk.
            for request in requests():
                settle()
                if request.key not in on_its_way and not journal.known([request.key]):
                    on_its_way.add(request.key)
                    yield request

        remaining = unanswered()

        def next_request() -> Request | None:
            with one_at_a_time:
                return next(remaining, None)

        def arrived(request: Request, outcome: Outcome) -> None:
            with one_at_a_time:
                if isinstance(outcome, Answer):
                    saved = journal.record(request, outcome)
                    tally.answered += 1
                else:
                    saved = journal.record_failure(request, outcome)
                    tally.failed += 1
                handed_over.append((request.key, saved))
                advance(1)

        helpers = self.default.helpers if self.runs_here else None
        model = self.own, replace(self.default, helpers=None), self.seed
        with (
            bar("answering", estimate.missing, "requests") as advance,
            (helpers or Helpers([])).answering(model, next_request, arrived),
        ):
            for request, outcome in self.answers(iter(next_request, None)):
                arrived(request, outcome)
        settle()
        return tally

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Outcome]]:
        """Yield each request with its outcome, as they finish."""
        own, source = self.own, self._resolved(weights=True)
        if isinstance(own, LocalTeacher):
            note(f"{self.source.described} answers in {choose_precision(own.precision).reason}")
            local = open_local(source, own.precision, batch=own.batch)
            yield from local.answers(requests)
            return
        note(f"{self.source.described} answers in vLLM")
        with opened(own, source, base=self.default.base, seed=self.seed) as vllm:
            yield from vllm.answers(requests)


TextSource = ApiText | LocalText


def any_runs_here(*sources: TextSource | None) -> bool:
    """Whether any source's model runs in this process, so that other processes can help."""
    return any(isinstance(source, LocalText) and source.runs_here for source in sources)


def answers_of(model: Any, requests: Iterable[Request]) -> Iterator[tuple[Request, Outcome]]:
    """In another process, answer requests with the model that `LocalText.send` describes."""
    own, default, seed = model
    return LocalText(own, {}, default, seed).answers(requests)


def _numerics(own: LocalTeacher | VllmTeacher) -> dict[str, Any]:
    """The dtype of a local model's computation, which is part of a request."""
    if isinstance(own, VllmTeacher):
        return {"dtype": own.dtype, **({"options": own.options} if own.options else {})}
    return {"dtype": str(choose_precision(own.precision).dtype).removeprefix("torch.")}
