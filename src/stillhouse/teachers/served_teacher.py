"""A teacher behind an OpenAI-compatible server that returns log-probabilities of prompts.

vLLM's completions accept token ids as the prompt and, with `prompt_logprobs: k`, return for each
token of it the k most likely tokens of that position, by id, and the token itself.

Shapes: L tokens of a segment, N supervised tokens, K most likely tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import numpy as np
import openai
import torch

from stillhouse.account import forward_flops
from stillhouse.data.batches import Batch, Batches
from stillhouse.data.shift import IGNORED
from stillhouse.errors import ModelError, SignalError
from stillhouse.event_loop import run_stoppable
from stillhouse.progress import note
from stillhouse.signals import SparseSignal
from stillhouse.signals.encodings import TopK
from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.api_keys import api_key
from stillhouse.teachers.record_store import segments_of
from stillhouse.teachers.redact import redacted
from stillhouse.teachers.stored_teacher import recorded_temperature
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView

RETRIES = 6
"""Retries of a request if the server is busy or the connection is lost, with growing pauses."""
TIMEOUT_SECONDS = 600.0
OVER_ONE = 1e-3
"""How far the sum of a row's probabilities may exceed 1 from rounding."""
LEAST = float(np.finfo(np.float16).min)
MOST_BYTES, MOST_BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Of a reply: in all, and additionally for each of the k tokens of each position."""
EXCERPT = 300
"""Characters of a server's words that are shown."""
RESUMED = "recorded signals are kept: run the same command to resume"


class ServedTeacher(Teacher):
    """The k most likely tokens of each position and the mass of all others, at temperature 1.

    Divergences are computed between distributions over these k tokens and one bucket for the rest:
    never larger than the full one, and blind to how the student orders the tail.
    vocabulary, tokenizer: of the served model; parameters: its size, a tied head counted
    once, for the account (0: not counted).
    Raises EndpointError: the key's variable is not set.
    """

    # In one round of requests: a killed process loses the answers of one round.
    tokens_together = 1 << 16

    def __init__(
        self,
        server: SignalServer,
        *,
        k: int,
        vocabulary: int,
        tokenizer: Any = None,
        parameters: int = 0,
        fingerprint: str = "",
    ) -> None:
        self.server, self.k, self.vocabulary = server, k, vocabulary
        self.described = server_name(server)
        self.fingerprint = fingerprint or self.described
        self._tokenizer, self._parameters = tokenizer, parameters
        self._noted = False
        self._device: torch.device | None = None
        self._key = api_key(server.key_env, where=self.described, setting="signals.server.key_env")

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def config(self) -> Any:
        return None

    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        """Raises ModelError if the server rejects a request, cannot be reached, or returns
        something other than the log-probabilities of these tokens."""
        ids = batch["input_ids"].flatten().tolist()
        supervised = (batch["labels"].flatten() != IGNORED).tolist()
        spans = segments_of(batch).spans
        answers = run_stoppable(self._answers([ids[start:end] for start, end in spans]))
        rows = [
            self._row(answer[at - start], ids[at])
            for (start, end), answer in zip(spans, answers, strict=True)
            for at in range(start + 1, end)
            if supervised[at]
        ]
        return TeacherView((self._signal(rows, self._device or batch["labels"].device),))

    def prepare(self, needs: TeacherNeeds, text: Batches | None = None) -> None:
        super().prepare(needs, text)
        temperature = recorded_temperature(TopK(self.k), needs)
        if temperature != 1.0:
            raise SignalError(
                f"a server answers at temperature 1, and a term has {temperature:g}",
                where="objective.terms",
                fix="use temperature 1, or a local teacher",
            )
        if not self._noted:
            self._noted = True
            note(
                f"{self.described} gives the {self.k} most likely tokens of each position; bias: "
                f"{TopK(self.k).bias}"
            )

    def place(self, device: torch.device, context: int) -> None:
        self._device = device

    def flops(self, tokens: int) -> int:
        return forward_flops(self._parameters, tokens)

    def __repr__(self) -> str:
        return f"Teacher({self.described}: {self.k} most likely of {self.vocabulary:,} tokens)"

    async def _answers(self, prompts: Sequence[Sequence[int]]) -> list[list[Any]]:
        free = asyncio.Semaphore(self.server.concurrency)
        async with openai.AsyncOpenAI(
            base_url=self.server.base_url,
            api_key=self._key or "none",  # the client requires one; servers without keys ignore it
            max_retries=RETRIES,
            timeout=TIMEOUT_SECONDS,
            # Prompts and the key are sent to no other address than the recipe's.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        ) as client:

            async def one(ids_L: Sequence[int]) -> list[Any]:
                async with free:
                    return await self._prompt_log_probabilities(client, ids_L)

            return await asyncio.gather(*map(one, prompts))

    async def _prompt_log_probabilities(
        self, client: openai.AsyncOpenAI, ids_L: Sequence[int]
    ) -> list[Any]:
        """For each token of the prompt, its position's {token id: {"logprob": ...}}; None for the
        first."""
        try:
            body = await self._body(client, ids_L)
        except openai.APIStatusError as error:
            raise self._rejected(error) from error
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            what = f"the server cannot be reached, or its reply ended early ({error})"
            raise self._error(what, "start it, or see its log") from error
        try:
            found = json.loads(body)["choices"][0]["prompt_logprobs"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            start = body[:EXCERPT].decode("utf-8", "replace")
            raise self._error(
                f"the server returns no prompt_logprobs ({type(error).__name__}: {error}): {start}",
                "use a server that has them for prompts of token ids (vLLM); base_url usually ends "
                "in /v1",
            ) from error
        if not isinstance(found, list) or len(found) != len(ids_L):
            length = len(found) if isinstance(found, list) else "no"
            raise self._error(
                f"the server returns {length} prompt_logprobs for a prompt of {len(ids_L)} tokens",
                "use a server that has prompt_logprobs for prompts of token ids (vLLM)",
            )
        return found

    async def _body(self, client: openai.AsyncOpenAI, ids_L: Sequence[int]) -> bytes:
        """A complete reply; the client repeats requests, but none whose reply was cut off."""
        most = MOST_BYTES + len(ids_L) * self.k * MOST_BYTES_PER_TOKEN
        for left in reversed(range(RETRIES)):
            try:
                async with client.completions.with_streaming_response.create(
                    model=self.server.model,
                    prompt=list(ids_L),
                    max_tokens=1,
                    temperature=0.0,
                    extra_body={"prompt_logprobs": self.k},
                ) as reply:
                    parts = bytearray()
                    async for part in reply.iter_bytes():
                        parts += part
                        if len(parts) > most:
                            raise self._error(
                                f"the server's reply has more than {most:,} bytes",
                                "check signals.server.base_url",
                            )
                    return bytes(parts)
            except httpx2.TransportError:
                if not left:
                    raise
        raise AssertionError

    def _rejected(self, error: openai.APIStatusError) -> ModelError:
        status, message = error.status_code, error.message
        if 300 <= status < 400:
            target = error.response.headers.get("location", "another address")
            return self._error(
                f"the server redirects to {target}; prompts and the key are sent to no other "
                "address than the recipe's",
                "set signals.server.base_url to that address, if you trust it",
            )
        if status in (401, 403):
            return self._error(
                f"the server rejects the key ({status}: {message})",
                "put a valid key into the environment variable of signals.server.key_env",
            )
        if status == 404:
            return self._error(
                f"the server has no such model or no completions: {message}",
                "compare signals.server with what GET base_url/models lists",
            )
        fix = f"a k of more than 20 needs vLLM started with --max-logprobs {self.k}"
        return self._error(f"the server rejects the request ({status}): {message}", fix)

    def _error(self, what: str, fix: str) -> ModelError:
        """The key may be in a server's words, which may be of any length and in several lines."""
        what = " ".join(redacted(what, self._key).split())
        if len(what) > 2 * EXCERPT:
            what = f"{what[: 2 * EXCERPT]}..."
        return ModelError(what, where=self.described, fix=f"{fix}; {RESUMED}")

    def _row(self, position: Any, token: int) -> tuple[list[int], list[float]]:
        """The k most likely tokens of a position, and their log-probabilities."""
        if not isinstance(position, Mapping) or str(token) not in position:
            raise self._error(
                f"the answer about token {token} does not have that token",
                "the server must have the teacher's own tokenizer, and return token ids",
            )
        try:
            pairs = [(float(v["logprob"]), int(i)) for i, v in position.items()]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise self._error(
                f"the answer about token {token} is malformed ({type(error).__name__}: {error})",
                "use a server that has prompt_logprobs by token id (vLLM)",
            ) from error
        found = sorted(pairs, reverse=True)[: self.k]
        log_probs, ids = [max(p, LEAST) for p, _ in found], [i for _, i in found]
        total = float(np.exp(log_probs).sum())
        known = len(set(ids)) == self.k and all(0 <= i < self.vocabulary for i in ids)
        if not known or not total <= 1.0 + OVER_ONE:
            raise self._error(
                f"the answer has {len(set(ids))} tokens up to id {max(ids, default=0)} of mass "
                f"{total:.4f}; requested were {self.k} of a vocabulary of {self.vocabulary:,}",
                "check that the server has the teacher of the recipe, at temperature 1",
            )
        return ids, log_probs

    def _signal(
        self, rows: Sequence[tuple[list[int], list[float]]], device: torch.device
    ) -> SparseSignal:
        shape = len(rows), self.k
        ids_NK = torch.tensor([ids for ids, _ in rows], dtype=torch.long).view(shape)
        log_p_NK = torch.tensor([log_p for _, log_p in rows], dtype=torch.float64).view(shape)
        tail_N = (1.0 - log_p_NK.exp().sum(1)).clamp(0.0, 1.0)
        return SparseSignal(
            ids_NK.to(device, non_blocking=True),
            log_p_NK.float().to(device, non_blocking=True),
            tail_N.float().to(device, non_blocking=True),
        )


def server_name(server: SignalServer) -> str:
    """The served model and the server's address."""
    return f"{server.model} at {server.base_url}"
