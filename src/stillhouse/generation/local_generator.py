"""Generates continuations with a model in this process, using continuous batching.

Each pass of the model adds a token to each of up to `batch` sequences. When a sequence ends, its
slot goes to the next prompt, so no pass is wasted on finished sequences, and prompts of any length
share a batch. Prompts are read several at a time, sorted by length. A model with sliding-window
attention cannot use slots: it generates in batches of prompts of similar length.

Shapes: B sequences being generated, N prompts being read, L tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.turn_end import end_of_answers
from stillhouse.generation.generator import Continuation, TextGenerator, TokenPrompt
from stillhouse.generation.kv_cache import SlotCache, caches_of, fits_padding, fits_slots
from stillhouse.generation.packed_linear import has_room_to_pack, is_faster_packed, packed_linear
from stillhouse.generation.sampling import next_tokens
from stillhouse.hardware import HeapLimit, Requested, choose_precision, default_device
from stillhouse.progress import note
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import AnyModel

BATCH = 32
_AHEAD = 8
"""Number of batches of prompts that are sorted by length together."""
_PASSES_WORTH_PACKING = 32
"""Packing the weights takes about as much time as it saves in 16 to 25 passes."""

OnToken = Callable[[Sequence[int]], object]


@dataclass
class _Writing:
    """A continuation in progress. length: number of tokens whose keys and values are cached."""

    number: int
    prompt: TokenPrompt
    started: float
    on_token: OnToken | None
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = torch.Generator().manual_seed(self.prompt.seed)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if self.on_token is not None:
            self.on_token(self.tokens)

    def uniform(self) -> float:
        """A random number in [0, 1) for sampling the next token; 0 if decoding is greedy."""
        if self.prompt.temperature <= 0:
            return 0.0
        return float(torch.rand((), generator=self.chance, dtype=torch.float64))

    def ended(self, ends: frozenset[int]) -> bool:
        return self.tokens[-1] in ends or len(self.tokens) >= self.prompt.max_tokens

    def finished(self, ends: frozenset[int]) -> tuple[int, Continuation]:
        return self.number, Continuation(
            ids=self.tokens,
            stop="stop" if self.tokens[-1] in ends else "length",
            logprobs=self.logprobs if self.prompt.logprobs else None,
            seconds=time.monotonic() - self.started,
        )


class LocalGenerator:
    """Generates continuations with a model in this process.

    model: a causal language model in eval mode. ends: token ids that end a sequence. on_token:
    called after each token with the continuation so far; an exception in it stops generation.
    pack: on CPUs, multiply by packed copies of the weights, which is faster (`packed_linear`), if
    memory suffices.

    Greedy continuations equal those of `model.generate`, except where batching changes rounding. A
    sampled continuation depends only on its prompt, up to rounding, and not on its neighbors.
    """

    def __init__(
        self,
        model: Any,
        ends: frozenset[int],
        *,
        batch: int = BATCH,
        on_token: OnToken | None = None,
        pack: bool = True,
    ) -> None:
        self.model, self.ends, self.batch, self.on_token = model, ends, batch, on_token
        self.pack = pack
        self.window = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0))
        self.slots = fits_slots(model)
        if batch > 1 and not self.slots and not fits_padding(model):
            note(
                f"{type(model).__name__} has recurrent states or chunked attention, so prompts are "
                "answered one at a time"
            )
            self.batch = 1

    @torch.inference_mode()
    def generate(self, prompts: Iterable[TokenPrompt]) -> Iterator[tuple[int, Continuation]]:
        """See `Generator`."""
        numbered = enumerate(prompts)
        batch: _Batch | None = None
        with ExitStack() as packed:
            while ahead := list(itertools.islice(numbered, _AHEAD * self.batch)):
                started = time.monotonic()
                waiting = [_Writing(*one, started, self.on_token) for one in ahead]
                waiting.sort(key=lambda writing: len(writing.prompt.ids), reverse=True)
                if self._is_worth_packing(waiting):
                    packed.enter_context(packed_linear(self.model))  # once
                if self.slots:
                    # If there are fewer prompts than slots here, there are no more.
                    batch = batch or _Batch(self, min(self.batch, len(waiting)))
                    yield from batch.run(waiting)
                    continue
                for at in range(0, len(waiting), self.batch):
                    yield from self._together(waiting[at : at + self.batch])
            if batch is not None:
                yield from batch.run([], to_the_end=True)

    def _is_worth_packing(self, waiting: Sequence[_Writing]) -> bool:
        tokens = sum(writing.prompt.max_tokens for writing in waiting)
        rows = min(self.batch, len(waiting))
        worth = self.pack and tokens >= _PASSES_WORTH_PACKING * rows
        faster = worth and is_faster_packed(rows, self.model.dtype)
        return faster and has_room_to_pack(self.model)

    def _together(self, writings: list[_Writing]) -> Iterator[tuple[int, Continuation]]:
        """Generate a batch without slots, until the last sequence has ended.

        Uses transformers' cache, with prompts padded on the left. A model without a cache reads the
        complete text again for each token.
        """
        longest = max(len(w.prompt.ids) for w in writings)
        pads = [longest - len(w.prompt.ids) for w in writings]
        padded = [[0] * pad + [*w.prompt.ids] for pad, w in zip(pads, writings, strict=True)]
        new_BL = torch.tensor(padded, device=self.model.device)
        pads_B = new_BL.new_tensor(pads)
        seen, caches, going = longest, dict[str, Any](), list(writings)
        while going:
            places_L = torch.arange(seen, device=new_BL.device)
            more: dict[str, Any] = {}
            if len(writings) > 1:  # one row needs none of these, which some models do not accept
                positions_BL = (places_L - pads_B[:, None]).clamp_min(0)
                more = {
                    "attention_mask": (places_L >= pads_B[:, None]).long(),
                    "position_ids": positions_BL[:, -new_BL.shape[1] :],
                    "logits_to_keep": 1,
                }
            output = self.model(input_ids=new_BL, use_cache=True, **caches, **more)
            caches, seen = caches_of(output), seen + 1
            rows = [row for row, writing in enumerate(writings) if writing in going]
            _add_tokens(going, output.logits[rows, -1])
            last_B1 = new_BL.new_tensor([writing.tokens[-1:] for writing in writings])
            new_BL = last_B1 if caches else torch.cat([new_BL, last_B1], 1)
            for writing in [one for one in going if one.ended(self.ends)]:
                going.remove(writing)
                yield writing.finished(self.ends)


class _Batch:
    """The sequences being generated: `now[i]` is in slot i."""

    def __init__(self, generator: LocalGenerator, capacity: int) -> None:
        self.generator, self.model, self.capacity = generator, generator.model, capacity
        self.now: list[_Writing] = []
        layers = self.model.config.get_text_config().num_hidden_layers
        self.cache = SlotCache(layers, capacity)
        self.heap = HeapLimit()

    def run(
        self, waiting: list[_Writing], *, to_the_end: bool = False
    ) -> Iterator[tuple[int, Continuation]]:
        """Generate until all waiting prompts have a slot. to_the_end: until all are finished."""
        enough = max(1, self.generator.batch // 4)
        # Reserve everything at once: while a cache grows, it exists twice.
        self.cache.reserve(
            max((len(w.prompt.ids) + w.prompt.max_tokens for w in waiting), default=0)
        )
        while waiting or (to_the_end and self.now):
            free = self.capacity - len(self.now)
            # Read several prompts in one pass, since each pass reads all the weights; but not all
            # of them, since prompts of similar length need little padding.
            some = min(enough, len(waiting))
            if waiting and free >= some:
                self._read([waiting.pop() for _ in range(some)])
            else:
                self._step()
            self.heap.check()
            yield from self._take_finished()

    def _read(self, chosen: list[_Writing]) -> None:
        """Read prompts into the next free slots, and generate each continuation's first token."""
        first = len(self.now)
        self.cache.fill(first, first + len(chosen))
        longest = max(len(w.prompt.ids) for w in chosen)
        ids = [[*w.prompt.ids] + [0] * (longest - len(w.prompt.ids)) for w in chosen]
        ends_N = torch.tensor([len(w.prompt.ids) - 1 for w in chosen])
        kept_U, where_N = ends_N.unique(return_inverse=True)
        logits_NUV = self.model(
            input_ids=torch.tensor(ids, device=self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=kept_U.to(self.model.device),
        ).logits
        for writing in chosen:
            writing.length = len(writing.prompt.ids)
        _add_tokens(chosen, logits_NUV[torch.arange(len(chosen)), where_N])
        self.now += chosen

    def _step(self) -> None:
        """Generate one more token for every sequence."""
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
        for writing in self.now:
            writing.length += 1
        _add_tokens(self.now, logits_BV)

    def _take_finished(self) -> Iterator[tuple[int, Continuation]]:
        """Remove finished sequences, and move the last ones into their slots."""
        for row in reversed(range(len(self.now))):
            writing = self.now[row]
            if not writing.ended(self.generator.ends):
                continue
            last = self.now.pop()
            if row < len(self.now):
                self.now[row] = last
                self.cache.move(len(self.now), row, last.length)
            yield writing.finished(self.generator.ends)


def _add_tokens(writings: Sequence[_Writing], logits_BV: Tensor) -> None:
    """Add the next token to each sequence. Log-probabilities are those at temperature 1, regardless
    of the sampling settings."""
    prompts = [writing.prompt for writing in writings]
    tokens = next_tokens(
        logits_BV,
        [prompt.temperature for prompt in prompts],
        [prompt.top_p for prompt in prompts],
        [writing.uniform() for writing in writings],
    )
    rows = [row for row, prompt in enumerate(prompts) if prompt.logprobs]
    if rows:
        log_p_BV = logits_BV[rows].float().log_softmax(-1)
        chosen_B = torch.tensor([tokens[row] for row in rows], device=log_p_BV.device)
        for row, logprob in zip(rows, log_p_BV.gather(1, chosen_B[:, None]), strict=True):
            writings[row].logprobs.append(float(logprob))
    for writing, token in zip(writings, tokens, strict=True):
        writing.add(token)


def open_local(
    model: AnyModel, precision: Requested = "auto", *, batch: int = BATCH
) -> TextGenerator[LocalGenerator]:
    """Load a model, then do the same as `local_text`. Raises ModelError."""
    dtype, device = choose_precision(precision).dtype, default_device()
    loaded = load_model(model, dtype=dtype).to(device)
    return local_text(loaded, load_tokenizer(model), batch=batch)


def local_text(model: Any, tokenizer: Any, *, batch: int = BATCH) -> TextGenerator[LocalGenerator]:
    """Answer chats with a loaded model. Raises ModelError if there is no chat template."""
    ends = end_of_answers(tokenizer, model.generation_config)
    return TextGenerator(LocalGenerator(model, ends, batch=batch), tokenizer)
