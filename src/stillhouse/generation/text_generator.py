"""Text around a generator: the chat template turns chats into tokens, and tokens become answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.reasoning import Marks, decode_with_marks
from stillhouse.errors import ModelError
from stillhouse.generation.chat_frame import MARK_TOKENS
from stillhouse.generation.generator import Continuation, Generator, TokenPrompt
from stillhouse.generation.request import Answer, Failure, Outcome, Request

G = TypeVar("G", bound=Generator)


@dataclass(frozen=True)
class TextGenerator(Generic[G]):
    """Answers requests. tokenizer: the model's own, with a chat template.

    Known parameters of a request: temperature (0 is greedy), top_p, max_tokens, seed, logprobs. A
    sampled answer depends only on its request, up to rounding. Raises ModelError if there is no
    chat template.
    """

    generator: G
    tokenizer: Any

    def __post_init__(self) -> None:
        require_chat_template(self.tokenizer)

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Outcome]]:
        """Each request with its answer, or with the reason why there is none, as they finish.
        `requests` are read lazily, some batches ahead."""
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
        # A template is a program that comes with the model, and fails in any way.
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
        """The text with its reasoning marks, including the one that the prompt ends with."""
        text = decode_with_marks(self.tokenizer, written.ids)
        # An engine's own text lacks special tokens: use it if none of them is a mark.
        if written.text is not None and text == self._without_marks(written):
            text = written.text
        end = self.tokenizer.decode(prompt.ids[-MARK_TOKENS:])
        return Marks.of(self.tokenizer).opened(end) + text

    def _without_marks(self, written: Continuation) -> str:
        return str(self.tokenizer.decode(written.ids, skip_special_tokens=True))


def require_chat_template(tokenizer: Any) -> None:
    """Raise ModelError if there is no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template, so the model cannot answer chats",
            where=getattr(tokenizer, "name_or_path", None) or None,
            fix="use an instruction-tuned model, or put a chat_template.jinja next to its "
            "tokenizer.json",
        )
