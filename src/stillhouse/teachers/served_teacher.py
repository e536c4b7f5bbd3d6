"""A teacher behind an OpenAI-compatible server that returns log-probabilities of prompts.

vLLM's completions endpoint accepts several prompts of token ids in a request. With
`prompt_logprobs: k`, it returns, for each token of a prompt, the k most likely tokens at that
position by id, and the token itself.

Shapes: L tokens of a segment, N supervised tokens, K most likely tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stillhouse.account import forward_flops
from stillhouse.data.batches import Batch, Batches
from stillhouse.data.shift import IGNORED
from stillhouse.errors import SignalError
from stillhouse.progress import note
from stillhouse.signals import SparseSignal
from stillhouse.signals.encodings import TopK
from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.record_store import segments_of
from stillhouse.teachers.signal_server import EXCERPT, Post, SignalLink
from stillhouse.teachers.stored_teacher import recorded_temperature
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView

OVER_ONE = 1e-3
"""How far the sum of a row's probabilities can exceed 1 due to rounding."""
LEAST = float(np.finfo(np.float16).min)
MOST_BYTES, MOST_BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Maximum size of a reply: a constant, plus this for each of the k tokens at each position."""
REQUEST_TOKENS = 4096
"""Approximate tokens in a request, unless a single document has more."""


class ServedTeacher(Teacher):
    """Returns the k most likely tokens at each position and the mass of all others, at temperature
    1.

    Divergences are computed over these k tokens and one bucket for the rest. Such a divergence is
    never larger than the full one, and ignores how the student orders the tail.
    vocabulary, tokenizer: the served model's. parameters: its size, a tied head counted once, for
    the FLOPs in the report (0: not counted).
    Raises EndpointError: the API key's environment variable is not set.
    """

    # One round of requests, whose answers a killed process loses.
    tokens_together = 1 << 16
    full_distributions = False

    def __init__(
        self,
        server: SignalServer,
        *,
        k: int,
        vocabulary: int,
        tokenizer: Any = None,
        parameters: int = 0,
    ) -> None:
        self.server, self.k, self.vocabulary = server, k, vocabulary
        fix = f"for a k of more than 20, start vLLM with --max-logprobs {k}"
        self._link = SignalLink(server, missing="completions", rejected=fix)
        self.described = self.fingerprint = self._link.described
        self.tokenizer, self._parameters = tokenizer, parameters
        self._noted = False

    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        """See `Teacher.answer`.

        Raises ModelError if the server rejects a request, cannot be reached, or returns something
        other than the log-probabilities of these tokens.
        """
        ids = batch["input_ids"].flatten().tolist()
        supervised = (batch["labels"].flatten() != IGNORED).tolist()
        spans = segments_of(batch).spans
        prompts = [ids[start:end] for start, end in spans]
        answers = self._link.each_prompt(prompts, REQUEST_TOKENS, self._prompt_log_probabilities)
        places = [
            (answer[at - start], ids[at])
            for (start, end), answer in zip(spans, answers, strict=True)
            for at in range(start + 1, end)
            if supervised[at]
        ]
        device = self._device or batch["labels"].device
        rows = [self._row(*place) for place in places]
        own = [max(float(position[str(token)]["logprob"]), LEAST) for position, token in places]
        own_N = torch.tensor(own).to(device, non_blocking=True)
        return TeacherView((self._signal(rows, device),), log_probs_N=own_N)

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
                f"{self.described} returns the {self.k} most likely tokens at each position; bias: "
                f"{TopK(self.k).bias}"
            )

    def flops(self, tokens: int) -> int:
        return forward_flops(self._parameters, tokens)

    def __repr__(self) -> str:
        return f"Teacher({self.described}: {self.k} most likely of {self.vocabulary:,} tokens)"

    async def _prompt_log_probabilities(
        self, post: Post, prompts: Sequence[list[int]]
    ) -> list[list[Any]]:
        """For each token of each prompt, {token id: {"logprob": ...}} of the tokens at its
        position; None for the first."""
        payload = {
            "model": self.server.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.k,
        }
        most = MOST_BYTES + sum(map(len, prompts)) * self.k * MOST_BYTES_PER_TOKEN
        body = await post("completions", payload, most)
        try:
            choices = json.loads(body)["choices"]
            found = {choice["index"]: choice["prompt_logprobs"] for choice in choices}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            start = body[:EXCERPT].decode("utf-8", "replace")
            raise self._link.error(
                f"the server returned no prompt_logprobs ({type(error).__name__}: {error}): "
                f"{start}",
                "use a server that returns them for prompts of token ids (vLLM); base_url usually "
                "ends in /v1",
            ) from error
        answers: list[Any] = [found.get(index) for index in range(len(prompts))]
        for answer, ids_L in zip(answers, prompts, strict=True):
            length = len(answer) if isinstance(answer, list) else "no"
            if length != len(ids_L):
                raise self._link.error(
                    f"the server returned {length} prompt_logprobs for a prompt of {len(ids_L)} "
                    "tokens",
                    "use a server that returns prompt_logprobs for prompts of token ids (vLLM)",
                )
        return answers

    def _row(self, position: Any, token: int) -> tuple[list[int], list[float]]:
        """The k most likely tokens at a position, and their log-probabilities."""
        if not isinstance(position, Mapping) or str(token) not in position:
            raise self._link.error(
                f"the server's log-probabilities for token {token} do not contain that token",
                "use a server that has the teacher's own tokenizer and returns token ids",
            )
        try:
            pairs = [(float(v["logprob"]), int(i)) for i, v in position.items()]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise self._link.error(
                f"the server's log-probabilities for token {token} are malformed "
                f"({type(error).__name__}: {error})",
                "use a server that returns prompt_logprobs by token id (vLLM)",
            ) from error
        found = sorted(pairs, reverse=True)[: self.k]
        log_probs, ids = [max(p, LEAST) for p, _ in found], [i for _, i in found]
        total = float(np.exp(log_probs).sum())
        known = len(set(ids)) == self.k and all(0 <= i < self.vocabulary for i in ids)
        if not known or not total <= 1.0 + OVER_ONE:
            raise self._link.error(
                f"the server returned {len(set(ids))} tokens with ids up to {max(ids, default=0)} "
                f"and a total probability of {total:.4f}, instead of {self.k} from a vocabulary of "
                f"{self.vocabulary:,}",
                "check that the server runs the recipe's teacher, at temperature 1",
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
