"""Who answers a recipe's prompts, and what it is asked: an API's model, or one in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stillhouse.errors import EndpointError, RunError
from stillhouse.generation.budget import Budget, Price
from stillhouse.generation.client import Client
from stillhouse.generation.generation_config import ApiTeacher, LocalTeacher, VllmTeacher
from stillhouse.generation.journal import Journal
from stillhouse.generation.local_generator import Generator
from stillhouse.generation.request import Answer, Request, endpoint_of
from stillhouse.generation.request_pool import Pool
from stillhouse.generation.vllm_engine import VllmGenerator, opened
from stillhouse.hardware import choose_precision, default_device
from stillhouse.progress import bar, note
from stillhouse.synthesis.estimate import Known, known_before
from stillhouse.synthesis.filters_config import LikelihoodChoice
from stillhouse.synthesis.prompts import Frame, Prompt, read_prompts
from stillhouse.synthesis.prompts_config import PromptsRecipe
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from stillhouse.teachers.load import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model


@dataclass(frozen=True)
class Origins:
    """base: where the recipe's paths start. folder: for the dropped rows and the summary. journal:
    where it is unless the recipe says. model: the teacher of a recipe that names no other."""

    base: Path
    folder: Path
    journal: Path
    model: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Asked:
    """The recipe's requests, read from the prompts' file each time they are gone through.

    only: those with these numbers in their order, 0 the first; None: all. prompts: where they
    come from, where that is no file.
    """

    section: PromptsRecipe
    base: Path
    request: Callable[[tuple[Any, ...], int], Request]
    only: frozenset[int] | None = None
    prompts: Callable[[], Iterator[Prompt]] | None = None

    @property
    def frame(self) -> Frame:
        examples = tuple((example.prompt, example.answer) for example in self.section.examples)
        return Frame(self.section.system, examples, self.section.student_sees)

    def pairs(self) -> Iterator[tuple[Prompt, Request]]:
        section, frame = self.section, self.frame
        number = 0
        for prompt in self._prompts():
            messages = frame.asked(prompt)
            for sample in range(section.samples):
                if self.only is None or number in self.only:
                    yield prompt, self.request(messages, sample)
                number += 1

    def _prompts(self) -> Iterator[Prompt]:
        section = self.section
        if self.prompts is not None:
            return self.prompts()
        assert section.path is not None
        path = self.base / Path(section.path).expanduser()
        return read_prompts(path, format=section.format, key=section.key, limit=section.limit)

    def requests(self) -> Iterator[Request]:
        return (request for _, request in self.pairs())


class Questions(Protocol):
    """Requests that can be gone through again and again."""

    def requests(self) -> Iterator[Request]: ...


def journal_path(section: SynthesizeRecipe, origins: Origins) -> Path:
    if section.journal is None:
        return origins.journal
    return origins.base / Path(section.journal).expanduser()


# --- teachers ----------------------------------------------------------------------------------


def text_teacher(
    section: SynthesizeRecipe, origins: Origins, seed: int, *, weights: bool = True
) -> TextSource:
    """weights: False fetches no more of a Hub model than it takes to know it."""
    if section.teacher.api is not None:
        return ApiText(section.teacher.api, section)
    assert section.teacher.here is not None
    return LocalText(section.teacher.here, section, origins, seed, weights)


def _sampling(whole: SynthesizeRecipe, token_limit: str) -> dict[str, Any]:
    section = whole.sampling
    parameters: dict[str, Any] = {}
    if section.temperature is not None:
        parameters["temperature"] = section.temperature
    parameters |= {token_limit: section.max_tokens, **section.extra}
    if section.top_p < 1:
        parameters["top_p"] = section.top_p
    if section.top_logprobs is not None:
        parameters |= {"logprobs": True, "top_logprobs": section.top_logprobs}
    elif isinstance(whole.filters.best_of, LikelihoodChoice):
        parameters["logprobs"] = True
    return parameters


class ApiText:
    def __init__(self, api: ApiTeacher, section: SynthesizeRecipe) -> None:
        self.api, self.budget = api, section.budget
        self.price = Price(api.price.input, api.price.output) if api.price else None
        self.parameters = _sampling(section, api.token_limit)
        self.endpoint = endpoint_of(api.base_url)

    def request(self, messages: tuple[Any, ...], sample: int) -> Request:
        return Request(self.endpoint, self.api.model, messages, self.parameters, sample)

    def answer(self, asked: Questions, journal: Journal, known: Known) -> tuple[int, int, bool]:
        """New answers, failures, and whether the budget ended it."""
        budget = Budget(self.budget.max_usd, self.budget.max_tokens)
        budget.spent = known.spent
        if self.price is None:
            note("the price is unknown, and so is the cost: give synthesize.teacher.api.price")
        with bar(f"asking {self.api.model}", known.requests, "answers") as advance:
            work = self._answer_all(asked, journal, budget, advance)
            pool = _stoppable(work)
        tally = pool.tally
        if tally.failed and not tally.answered and known.missing == known.requests:
            *_, (_, kind, reason) = journal.failures()
            raise EndpointError(
                f"no request was answered; the last failure: {kind}: {reason}",
                where=self.endpoint,
                fix="mend what it says, then give the same command again",
            )
        return tally.answered, tally.failed, tally.out_of_budget

    async def _answer_all(
        self, asked: Questions, journal: Journal, budget: Budget, advance: Callable[[int], None]
    ) -> Pool:
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
                client.ask,
                journal,
                budget,
                concurrency=api.concurrency,
                price=self.price,
                advance=advance,
            )
            await pool.answer_all(asked.requests())
            return pool


class LocalText:
    """A model in this process: answered by `local.Generator`, or by vLLM, which may run in
    a process of its own."""

    price = Price(0.0, 0.0)

    def __init__(
        self,
        own: LocalTeacher | VllmTeacher,
        section: SynthesizeRecipe,
        origins: Origins,
        seed: int,
        weights: bool,
    ) -> None:
        self.own, self.seed, self.base = own, seed, origins.base
        self.trust = origins.trust_remote_code
        name, revision = own.model or origins.model, own.revision
        if own.model is None:
            revision = origins.revision
        self.source = resolve_model(name, revision=revision, base=origins.base, weights=weights)
        self.parameters = {**_sampling(section, "max_tokens"), "seed": seed, **_numbers(own)}

    def request(self, messages: tuple[Any, ...], sample: int) -> Request:
        endpoint = "vllm" if isinstance(self.own, VllmTeacher) else "local"
        return Request(endpoint, self.source.fingerprint, messages, self.parameters, sample)

    def answer(self, asked: Questions, journal: Journal, known: Known) -> tuple[int, int, bool]:
        """New answers and failures; a local teacher has no budget."""
        counts: Counter[str] = Counter()
        on_its_way: set[str] = set()
        handed_over: deque[tuple[str, Future[None]]] = deque()

        def settle() -> None:
            """Waits until what was answered is on the disk, and forgets it."""
            while handed_over:
                key, saved = handed_over.popleft()
                saved.result()
                on_its_way.discard(key)

        def requests() -> Iterator[Request]:
            # A generator reads a batch before it begins it: the one before is on the disk by then.
            for request in asked.requests():
                settle()
                yield request

        with self._generator() as generator, bar("answering", known.missing, "answers") as advance:
            todo = _unanswered(requests(), journal, on_its_way)
            for request, outcome in generator.answers(todo):
                if isinstance(outcome, Answer):
                    saved = journal.record(request, outcome)
                else:
                    saved = journal.record_failure(request, outcome)
                handed_over.append((request.key, saved))
                counts[type(outcome).__name__] += 1
                advance(1)
            settle()
        return counts["Answer"], counts["Failure"], False

    @contextmanager
    def _generator(self) -> Iterator[Generator | VllmGenerator]:
        path, trust = self.source.path, self.trust
        if isinstance(self.own, VllmTeacher):
            note(f"{self.source.described} answers in vLLM")
            with opened(
                self.own, path, base=self.base, seed=self.seed, trust_remote_code=trust
            ) as generator:
                yield generator
            return
        precision = choose_precision(self.own.precision, default_device())
        note(f"{self.source.described} answers in {precision.reason}")
        model = load_model(path, dtype=precision.dtype, trust_remote_code=trust)
        tokenizer = load_tokenizer(path, trust_remote_code=trust)
        yield Generator(model.to(default_device()), tokenizer, batch=self.own.batch)


def _numbers(own: LocalTeacher | VllmTeacher) -> dict[str, Any]:
    """What decides in which numbers a model in this process computes: part of a request."""
    if isinstance(own, VllmTeacher):
        return {"dtype": own.dtype, **({"options": own.options} if own.options else {})}
    precision = choose_precision(own.precision, default_device())
    return {"dtype": str(precision.dtype).removeprefix("torch.")}


TextSource = ApiText | LocalText


def answer_all(teacher: TextSource, asked: Questions, journal: Journal) -> None:
    """Asks what the journal lacks. Some may be without an answer after that, see `may_answer`.

    Raises EndpointError; RunError where the budget ends before the answers do: those that arrived
    are kept.
    """
    known = known_before(asked.requests(), journal, teacher.price)
    if not known.missing:
        return
    new, _, out_of_budget = teacher.answer(asked, journal, known)
    if out_of_budget:
        raise RunError(
            f"the budget is used up: {known.answered + new:,} of {known.requests:,} answers are "
            "there",
            where=journal.path,
            fix="raise the budget, or give fewer texts; nothing is asked twice",
        )


def may_answer(asked: Questions, journal: Journal) -> int:
    """Requests without an answer that may have one when they are asked again: all but those that
    were refused for what they are."""
    last = {key: kind for key, kind, _ in journal.failures()}
    return sum(
        last.get(request.key) != "refused" and journal.get(request.key) is None
        for request in asked.requests()
    )


def _unanswered(
    requests: Iterable[Request], journal: Journal, on_its_way: set[str]
) -> Iterator[Request]:
    for request in requests:
        if request.key not in on_its_way and journal.get(request.key) is None:
            on_its_way.add(request.key)
            yield request


def _stoppable(work: Coroutine[Any, Any, Pool]) -> Pool:
    """Runs `work`; Ctrl-C or SIGTERM cancels it, and does what it always does after that. A second
    one cancels it again, while it waits for what is on its way.

    An exception out of a signal handler could be lost inside the event loop.
    """
    caught: list[int] = []

    async def whole() -> Pool:
        task = asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            if not caught:
                note("waiting for the answers on their way; once more to leave them")
            caught.append(number)
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in before:
            loop.add_signal_handler(number, stop, number)
        return await work

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        return asyncio.run(whole())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            os.kill(os.getpid(), caught[0])
