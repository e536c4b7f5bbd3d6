"""Answers from a model in this process, many at a time (continuous batching).

One pass of the model adds a token to each of up to `batch` answers. An answer that ends gives its
slot to the next prompt, so that no pass works for answers that are finished, and prompts of any
length share it. Prompts are read several at a time, sorted by length. A model whose layers attend
to a window of tokens has no such slots: its answers are written in batches of prompts of a like
length.

Shapes: B answers being written, N prompts being read, L tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.generation.kv_cache import SlotCache, fits_padding, fits_slots
from stillhouse.generation.request import Answer, Failure, Request
from stillhouse.progress import note

BATCH = 32
_AHEAD = 8
"""Batches of prompts that are sorted by length together."""
_NUCLEUS = 512
"""The likeliest tokens that top_p looks at before it sorts the whole vocabulary."""

Outcome = Answer | Failure


@dataclass
class _Writing:
    """One answer as it grows. length: tokens whose keys and values are in its slot. logprobs: of
    the tokens, where the request asks for them."""

    request: Request
    prompt: list[int]
    most: int
    chance: torch.Generator
    started: float = 0.0
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, token: int, logits_V: Tensor) -> None:
        """The model's own log-probability is that at temperature 1, whatever the sampling."""
        self.tokens.append(token)
        if self.request.parameters.get("logprobs"):
            self.logprobs.append(float(logits_V.float().log_softmax(-1)[token]))

    def ended(self, ends: frozenset[int]) -> bool:
        return self.tokens[-1] in ends or len(self.tokens) >= self.most


class Generator:
    """model, tokenizer: a causal language model in eval mode, and its own tokenizer.

    Known parameters of a request: temperature (0 is greedy), top_p, max_tokens, seed, logprobs.
    Greedy answers are those of `model.generate`, token by token, as far as a batch's sums round
    alike. A sampled answer depends on its request alone, rounding aside, and not on its neighbours.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = BATCH) -> None:
        require_chat_template(tokenizer, model.config.name_or_path or None)
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.ends = _end_tokens(model, tokenizer)
        self.window = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0))
        self.slots = fits_slots(model)
        if not self.slots and not fits_padding(model):
            note(f"{type(model).__name__} has states or chunks: prompts are answered one by one")
            self.batch = 1

    @torch.inference_mode()
    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Outcome]]:
        """Each request with its answer, or with the reason why there is none, in the order in
        which they are finished. `requests` is read lazily, some batches ahead."""
        requests = iter(requests)
        batch = _Batch(self)
        while ahead := list(itertools.islice(requests, _AHEAD * self.batch)):
            waiting: list[_Writing] = []
            for request in ahead:
                writing = self._begin(request)
                if isinstance(writing, Failure):
                    yield request, writing
                else:
                    waiting.append(writing)
            waiting.sort(key=lambda writing: len(writing.prompt), reverse=True)
            if self.slots:
                yield from batch.run(waiting)
                continue
            for at in range(0, len(waiting), self.batch):
                yield from self._together(waiting[at : at + self.batch])
        yield from batch.run([], to_the_end=True)

    def _begin(self, request: Request) -> _Writing | Failure:
        found = prompt_and_room(self.tokenizer, request, self.window)
        if isinstance(found, Failure):
            return found
        prompt, most = found
        # The key tells samples of one prompt apart, and holds the recipe's seed.
        chance = torch.Generator().manual_seed(int(request.key[:15], 16))
        return _Writing(request, prompt, most, chance, time.monotonic())

    def choose(self, logits_V: Tensor, writing: _Writing) -> int:
        """The next token: the likeliest at temperature 0, else drawn."""
        parameters = writing.request.parameters
        temperature = float(parameters.get("temperature", 0.0))
        if temperature <= 0:
            return int(logits_V.argmax())
        return draw(
            torch.softmax(logits_V.float() / temperature, -1),
            float(parameters.get("top_p", 1.0)),
            float(torch.rand((), generator=writing.chance, dtype=torch.float64)),
        )

    def finished(self, writing: _Writing) -> Answer:
        stopped = writing.tokens[-1] in self.ends
        return Answer(
            text=self.tokenizer.decode(writing.tokens, skip_special_tokens=True),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(writing.prompt),
            completion_tokens=len(writing.tokens),
            cost=0.0,
            seconds=time.monotonic() - writing.started,
            logprobs=[{"logprob": value} for value in writing.logprobs] or None,
        )

    def _together(self, writings: list[_Writing]) -> Iterator[tuple[Request, Outcome]]:
        """For models whose cache has no slots: transformers' cache, prompts padded on the left,
        until the last answer has ended."""
        longest = max(len(w.prompt) for w in writings)
        pads = [longest - len(w.prompt) for w in writings]
        rows = [[0] * pad + w.prompt for pad, w in zip(pads, writings, strict=True)]
        new_BL = torch.tensor(rows, device=self.model.device)
        pads_B = new_BL.new_tensor(pads)
        seen, cache, going = longest, None, list(writings)
        while going:
            places_L = torch.arange(seen, device=new_BL.device)
            more: dict[str, Any] = {}
            if len(writings) > 1:  # of one row, not every model wants to know more
                positions_BL = (places_L - pads_B[:, None]).clamp_min(0)
                more = {
                    "attention_mask": (places_L >= pads_B[:, None]).long(),
                    "position_ids": positions_BL[:, -new_BL.shape[1] :],
                    "logits_to_keep": 1,
                }
            output = self.model(input_ids=new_BL, past_key_values=cache, use_cache=True, **more)
            cache, seen = output.past_key_values, seen + 1
            for row, writing in enumerate(writings):
                if not writing.tokens or not writing.ended(self.ends):
                    logits_V = output.logits[row, -1]
                    writing.add(self.choose(logits_V, writing), logits_V)
            new_BL = new_BL.new_tensor([writing.tokens[-1:] for writing in writings])
            for writing in [one for one in going if one.ended(self.ends)]:
                going.remove(writing)
                yield writing.request, self.finished(writing)


class _Batch:
    """The answers being written: the one at place i of `now` is in slot i."""

    def __init__(self, generator: Generator) -> None:
        self.generator, self.model = generator, generator.model
        self.now: list[_Writing] = []
        layers = self.model.config.get_text_config().num_hidden_layers
        self.cache = SlotCache(layers, generator.batch)

    def run(
        self, waiting: list[_Writing], *, to_the_end: bool = False
    ) -> Iterator[tuple[Request, Outcome]]:
        """Writes until all that wait have a slot; to the end: until all are finished."""
        enough = max(1, self.generator.batch // 4)
        while waiting or (to_the_end and self.now):
            free = self.generator.batch - len(self.now)
            # Some prompts are read in one pass, since each pass reads all the weights; not all of
            # them, since those of a like length have little padding between them.
            some = min(enough, len(waiting))
            if waiting and free >= some:
                self._read([waiting.pop() for _ in range(some)])
            else:
                self._step()
            yield from self._take_finished()

    def _read(self, chosen: list[_Writing]) -> None:
        """Prompts into slots after those in use, and the first token of each answer."""
        first = len(self.now)
        self.cache.reserve(max(len(w.prompt) + w.most for w in chosen))
        self.cache.fill(first, first + len(chosen))
        longest = max(len(w.prompt) for w in chosen)
        ids = [w.prompt + [0] * (longest - len(w.prompt)) for w in chosen]
        ends_N = torch.tensor([len(w.prompt) - 1 for w in chosen])
        kept_U, where_N = ends_N.unique(return_inverse=True)
        logits_NUV = self.model(
            input_ids=torch.tensor(ids, device=self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=kept_U.to(self.model.device),
        ).logits
        for row, writing in enumerate(chosen):
            writing.length = len(writing.prompt)
            logits_V = logits_NUV[row, where_N[row]]
            writing.add(self.generator.choose(logits_V, writing), logits_V)
        self.now += chosen

    def _step(self) -> None:
        """One more token for every answer."""
        device = self.model.device
        lengths_B = torch.tensor([w.length for w in self.now], device=device)
        mask_B11T = self.cache.step(lengths_B)
        logits_BV = self.model(
            input_ids=torch.tensor([w.tokens[-1:] for w in self.now], device=device),
            position_ids=lengths_B[:, None],
            attention_mask=mask_B11T,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        greedy = logits_BV.argmax(-1).tolist()
        for row, writing in enumerate(self.now):
            writing.length += 1
            sampled = float(writing.request.parameters.get("temperature", 0.0)) > 0
            token = self.generator.choose(logits_BV[row], writing) if sampled else greedy[row]
            writing.add(token, logits_BV[row])

    def _take_finished(self) -> Iterator[tuple[Request, Outcome]]:
        """Finished answers leave; the last ones move into their slots."""
        for row in reversed(range(len(self.now))):
            writing = self.now[row]
            if not writing.ended(self.generator.ends):
                continue
            last = self.now.pop()
            if row < len(self.now):
                self.now[row] = last
                self.cache.move(len(self.now), row, last.length)
            yield writing.request, self.generator.finished(writing)


def require_chat_template(tokenizer: Any, where: str | None) -> None:
    """Raises ModelError where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template, so the model cannot be asked",
            where=where,
            fix="use an instruction-tuned model, or put a chat_template.jinja beside its "
            "tokenizer.json",
        )


def prompt_and_room(
    tokenizer: Any, request: Request, window: int
) -> tuple[list[int], int] | Failure:
    """The prompt's tokens, and how many an answer may have; a failure where there is no room.

    window: tokens that the model reads and writes in all, 0 where nobody knows.
    """
    encoded = tokenizer.apply_chat_template(
        [dict(message) for message in request.messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    prompt = list(encoded["input_ids"])
    most = int(request.parameters["max_tokens"])
    if window:
        most = min(most, window - len(prompt))
    if most < 1:
        reason = f"the prompt has {len(prompt)} tokens, and the model reads {window}"
        return Failure("refused", reason)
    return prompt, most


def draw(probabilities_V: Tensor, top_p: float, uniform: float) -> int:
    """A token by inverse transform sampling among the fewest likeliest that hold the mass top_p.

    uniform: in [0, 1). The same for any order of equally likely tokens that torch's sort gives.
    """
    if top_p >= 1:
        sums_V = probabilities_V.double().cumsum(-1)
        return min(
            int(torch.searchsorted(sums_V, uniform * float(sums_V[-1]), right=True)),
            len(sums_V) - 1,
        )
    values_K, ids_K = probabilities_V.topk(min(_NUCLEUS, len(probabilities_V)))
    sums_K = values_K.double().cumsum(-1)
    if float(sums_K[-1]) < top_p:
        values_K, ids_K = probabilities_V.sort(descending=True)
        sums_K = values_K.double().cumsum(-1)
    size = min(int(torch.searchsorted(sums_K, top_p)) + 1, len(sums_K))
    chosen = int(torch.searchsorted(sums_K[:size], uniform * float(sums_K[size - 1]), right=True))
    return int(ids_K[min(chosen, size - 1)])


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return frozenset(end for end in ends if end is not None)
