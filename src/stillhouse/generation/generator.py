"""Generators: token ids in; token ids, log-probabilities, and a stop reason out.

`LocalGenerator` runs a model in this process, and `VllmGenerator` runs an engine that does its own
batching. `TextGenerator` wraps either to answer requests with text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.reasoning import Marks, decode_with_marks
from stillhouse.errors import ModelError
from stillhouse.generation.chat_frame import MARK_TOKENS
from stillhouse.generation.request import Answer, Failure, Outcome, Request


@dataclass(frozen=True)
class TokenPrompt:
    """Tokens to continue, and sampling settings.

    max_tokens: maximum length of the continuation. temperature: 0 is greedy. top_p: nucleus
    sampling. seed: equal prompts with equal seeds get equal continuations. logprobs: whether to
    return log-probabilities.
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

    ids: the new tokens, including the one that ends the sequence. stop: `stop` (an end token was
    generated), `length` (max_tokens was reached), or an engine-specific reason. logprobs: the new
    tokens' log-probabilities at temperature 1; None if not requested. seconds: from reading the
    prompt to the last token. text: the tokens as decoded by the engine; None if it did not.
    """

    ids: Sequence[int]
    stop: str
    logprobs: Sequence[float] | None = None
    seconds: float = 0.0
    text: str | None = None


class Generator(Protocol):
    """Continues prompts. window: maximum tokens of prompt and continuation; 0 if unknown."""

    @property
    def window(self) -> int: ...

    def generate(self, prompts: Iterable[TokenPrompt]) -> Iterator[tuple[int, Continuation]]:
        """Yield each prompt's index with its continuation, as they finish.

        `prompts` is read lazily, some batches ahead. Raises ModelError if the engine fails.
        """
        ...


G = TypeVar("G", bound=Generator)


@dataclass(frozen=True)
class TextGenerator(Generic[G]):
    """Answers requests. tokenizer: the model's, with a chat template.

    Supported request parameters: temperature (0 is greedy), top_p, max_tokens, seed, logprobs. A
    sampled answer depends only on its request, up to rounding. Raises ModelError if there is no
    chat template.
    """

    generator: G
    tokenizer: Any

    def __post_init__(self) -> None:
        require_chat_template(self.tokenizer)

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Outcome]]:
        """Yield each request with its answer or failure, as they finish.

        `requests` is read lazily, some batches ahead.
        """
        sent: dict[int, tuple[Request, TokenPrompt]] = {}
        refused: list[tuple[Request, Failure]] = []

        def prompts() -> Iterator[TokenPrompt]:
            number = 0
            for request in requests:
                prompt = self._prompt(request)
                if isinstance(prompt, Failure):
                    refused.append((request, prompt))
                    continue
                sent[number] = request, prompt
                number += 1
                yield prompt

        for number, continuation in self.generator.generate(prompts()):
            while refused:
                yield refused.pop(0)
            request, prompt = sent.pop(number)
            yield request, self._answer(prompt, continuation)
        yield from refused

    def _prompt(self, request: Request) -> TokenPrompt | Failure:
        parameters, window = request.parameters, self.generator.window
        try:
            ids = chat_ids(self.tokenizer, request.messages)
        # A template is a program that comes with the model and can raise any exception.
        except Exception as error:
            return Failure("refused", f"the chat template rejects the messages: {error}")
        most = int(parameters["max_tokens"])
        if window:
            most = min(most, window - len(ids))
        if most < 1:
            reason = f"the prompt has {len(ids)} tokens, and the model reads {window}"
            return Failure("refused", reason)
        return TokenPrompt(
            ids,
            most,
            temperature=float(parameters.get("temperature", 0.0)),
            top_p=float(parameters.get("top_p", 1.0)),
            # The key distinguishes samples of one prompt, and includes the recipe's seed.
            seed=int(request.key[:15], 16),
            logprobs=bool(parameters.get("logprobs")),
        )

    def _answer(self, prompt: TokenPrompt, written: Continuation) -> Outcome:
        if written.stop not in ("stop", "length"):
            return Failure("server", f"the engine ended the answer: {written.stop}")
        said = Marks.of(self.tokenizer).split(
            self._text(prompt, written), cut_off=written.stop == "length"
        )
        return Answer(
            text=said.answer,
            reasoning=said.reasoning or None,
            finish_reason=written.stop,
            prompt_tokens=len(prompt.ids),
            completion_tokens=len(written.ids),
            cost=0.0,
            seconds=written.seconds,
            logprobs=[{"logprob": value} for value in written.logprobs or ()] or None,
        )

    def _text(self, prompt: TokenPrompt, written: Continuation) -> str:
        """Decode the text with its reasoning marks, including one at the end of the prompt."""
        tokenizer, ids = self.tokenizer, written.ids
        text = decode_with_marks(tokenizer, ids)
        # The engine's text lacks special tokens, so use it only if none of them is a mark.
        if written.text is not None and text == tokenizer.decode(ids, skip_special_tokens=True):
            text = written.text
        end = tokenizer.decode(prompt.ids[-MARK_TOKENS:])
        return Marks.of(tokenizer).opened(end) + text


def require_chat_template(tokenizer: Any) -> None:
    """Raise ModelError if there is no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template, so the model cannot answer chats",
            where=getattr(tokenizer, "name_or_path", None) or None,
            fix="use an instruction-tuned model, or put a chat_template.jinja next to its "
            "tokenizer.json",
        )
