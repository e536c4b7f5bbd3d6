"""Generators: token ids in; token ids, log-probabilities, and a stop reason out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from stillhouse.generation.generator import Continuation, Generator, TextGenerator, TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.request import Answer, Failure, Request
from tests import tiny

ENDS = frozenset(range(24))
"""Tokens that end an answer, enough that a random model occasionally writes one."""


def prompts(**how: float | bool) -> list[TokenPrompt]:
    lengths = (3, 17, 8, 1, 30)
    return [
        TokenPrompt([30 + (7 * n + i) % 60 for i in range(length)], 4 + 3 * n, **how)  # type: ignore[arg-type]
        for n, length in enumerate(lengths)
    ]


def written(generator: Generator, asked: list[TokenPrompt]) -> list[Continuation]:
    """The continuations, in the order of the prompts."""
    found = dict(generator.generate(asked))
    return [found[number] for number in range(len(asked))]


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_the_most_probable_and_stop_at_an_end_token(batch: int) -> None:
    model, asked = tiny.llama(), prompts(logprobs=True)
    stops = set()
    for prompt, found in zip(
        asked, written(LocalGenerator(model, ENDS, batch=batch), asked), strict=True
    ):
        ids = list(prompt.ids)
        assert found.logprobs is not None
        assert len(found.logprobs) == len(found.ids)
        for token, logprob in zip(found.ids, found.logprobs, strict=True):
            with torch.no_grad():
                log_p_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert token == int(log_p_V.argmax())
            assert logprob == pytest.approx(float(log_p_V[token]), abs=1e-4)
            ids.append(token)
        assert not ENDS & set(found.ids[:-1])
        assert (found.ids[-1] in ENDS) == (found.stop == "stop")
        assert found.stop == "stop" or len(found.ids) == prompt.max_tokens
        stops.add(found.stop)
    assert stops == {"stop", "length"}, "the toy model must produce both"


def test_equal_seeds_generate_equal_text() -> None:
    generator = LocalGenerator(tiny.llama(), frozenset(), batch=2)
    ids = [40, 41, 42]
    asked = [TokenPrompt(ids, 12, temperature=1.0, seed=seed) for seed in (1, 2, 1, 3)]
    one, other, again, last = (found.ids for found in written(generator, asked))
    assert one == again
    assert len({tuple(one), tuple(other), tuple(last)}) == 3
    assert all(found.logprobs is None for found in written(generator, asked))


class Scripted:
    """Repeats each prompt's last token, the last prompt first; aborts answers of 7 tokens."""

    window = 40

    def generate(self, prompts: Iterable[TokenPrompt]) -> Iterator[tuple[int, Continuation]]:
        for number, prompt in reversed(list(enumerate(prompts))):
            stop = "abort" if prompt.max_tokens == 7 else "length"
            yield number, Continuation([prompt.ids[-1]] * prompt.max_tokens, stop)


def test_any_generator_answers_chats() -> None:
    """A prompt that is too long, and an answer that the engine aborts, do not affect the others."""
    requests = [
        Request("local", "m", ({"role": "user", "content": text},), {"max_tokens": tokens})
        for text, tokens in (("a", 3), ("b" * 90, 3), ("c", 7), ("d", 2))
    ]
    answers = TextGenerator(Scripted(), tiny.tokenizer()).answers(requests)
    found = {request.key: outcome for request, outcome in answers}
    first, long, aborted, last = (found[request.key] for request in requests)
    assert isinstance(first, Answer)
    assert isinstance(last, Answer)
    assert (first.completion_tokens, last.completion_tokens) == (3, 2)
    assert (first.finish_reason, first.cost) == ("length", 0.0)
    assert isinstance(long, Failure)
    assert "the model reads 40" in long.reason
    assert isinstance(aborted, Failure)
    assert aborted.reason == "the engine ended the answer: abort"
