"""A teacher behind an OpenAI-compatible server that returns log-probabilities of prompts.

vLLM's completions accept token ids as the prompt and, with `prompt_logprobs: k`, return for each
token of it the k most likely tokens of that position, by id, and the token itself.

Shapes: L tokens of a segment, N supervised tokens, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import torch

from stillhouse.account import forward_flops
from stillhouse.data.batches import Batch, Batches
from stillhouse.data.shift import IGNORED
from stillhouse.errors import ModelError, SignalError
from stillhouse.progress import note
from stillhouse.signals import SparseSignal
from stillhouse.signals.encodings import TopK
from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.api_keys import api_key
from stillhouse.teachers.record_store import segments_of
from stillhouse.teachers.stored_teacher import recorded_temperature
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView

RETRIES = 6
"""Retries of a request if the server is busy or the connection is lost, with growing pauses."""
TIMEOUT_SECONDS = 600.0
OVER_ONE = 1e-3
"""How far the sum of a row's probabilities may exceed 1 from rounding."""
LEAST = float(np.finfo(np.float16).min)
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
        key = api_key(server.key_env, where=self.described, setting="signals.server.key_env")
        self._client = openai.OpenAI(
            base_url=server.base_url,
            api_key=key or "none",  # the client requires one; servers without keys ignore it
            max_retries=RETRIES,
            timeout=TIMEOUT_SECONDS,
            # Prompts and the key are sent to no other address than the recipe's.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

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
        with ThreadPoolExecutor(self.server.concurrency) as pool:
            prompts = [ids[start:end] for start, end in spans]
            answers = list(pool.map(self._prompt_log_probabilities, prompts))
        rows = [
            self._row(answer[at - start], ids[at])
            for (start, end), answer in zip(spans, answers, strict=True)
            for at in range(start + 1, end)
            if supervised[at]
        ]
        return TeacherView((self._signal(rows, batch["labels"].device),))

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

    def flops(self, tokens: int) -> int:
        return forward_flops(self._parameters, tokens)

    def __repr__(self) -> str:
        return f"Teacher({self.described}: {self.k} most likely of {self.vocabulary:,} tokens)"

    def _prompt_log_probabilities(self, ids_L: Sequence[int]) -> list[Any]:
        """For each token of the prompt, its position's {token id: {"logprob": ...}}; None for the
        first."""
        where, k = self.described, self.k
        try:
            completion = self._client.completions.create(
                model=self.server.model,
                prompt=list(ids_L),
                max_tokens=1,
                temperature=0.0,
                extra_body={"prompt_logprobs": k},
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ModelError(
                "the server rejects the key",
                where=where,
                fix="put a valid key into the environment variable of signals.server.key_env",
            ) from error
        except openai.NotFoundError as error:
            raise ModelError(
                f"the server has no such model or no completions: {error.message}",
                where=where,
                fix="compare signals.server with what GET base_url/models lists",
            ) from error
        except openai.APIStatusError as error:
            raise ModelError(
                f"the server rejects the request ({error.status_code}): {error.message}",
                where=where,
                fix=f"a k of more than 20 needs vLLM started with --max-logprobs {k}; {RESUMED}",
            ) from error
        except openai.APIConnectionError as error:
            raise ModelError(
                f"the server cannot be reached ({error})", where=where, fix=f"start it; {RESUMED}"
            ) from error
        except (openai.OpenAIError, ValueError, TypeError, RecursionError) as error:
            raise ModelError(
                f"the server's reply is not a completion ({type(error).__name__}: {error})",
                where=where,
                fix=f"check signals.server.base_url, which usually ends in /v1; {RESUMED}",
            ) from error
        # The client does not check types: a choice may be anything.
        choices = getattr(completion, "choices", None) or [None]
        found = getattr(choices[0], "prompt_logprobs", None)
        if not isinstance(found, list) or len(found) != len(ids_L):
            length = len(found) if isinstance(found, list) else "no"
            raise ModelError(
                f"the server returns {length} prompt_logprobs for a prompt of {len(ids_L)} tokens",
                where=where,
                fix="use a server that has prompt_logprobs for prompts of token ids (vLLM)",
            )
        return found

    def _row(self, position: Any, token: int) -> tuple[list[int], list[float]]:
        """The k most likely tokens of a position, and their log-probabilities."""
        where, k = self.described, self.k
        if not isinstance(position, Mapping) or str(token) not in position:
            raise ModelError(
                f"the answer about token {token} does not have that token",
                where=where,
                fix="the server must have the teacher's own tokenizer, and return token ids",
            )
        try:
            pairs = [(float(v["logprob"]), int(i)) for i, v in position.items()]
        except (LookupError, TypeError, ValueError) as error:
            raise ModelError(
                f"the answer about token {token} is malformed ({type(error).__name__}: {error})",
                where=where,
                fix="use a server that has prompt_logprobs by token id (vLLM)",
            ) from error
        found = sorted(pairs, reverse=True)[:k]
        log_probs, ids = [max(p, LEAST) for p, _ in found], [i for _, i in found]
        total = float(np.exp(log_probs).sum())
        known = len(found) == k and all(0 <= i < self.vocabulary for i in ids)
        if not known or not total <= 1.0 + OVER_ONE:
            raise ModelError(
                f"the answer has {len(found)} tokens up to id {max(ids, default=0)} of mass "
                f"{total:.4f}; "
                f"requested were {k} of a vocabulary of {self.vocabulary:,}",
                where=where,
                fix="check that the server has the teacher of the recipe, at temperature 1",
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
            ids_NK.to(device), log_p_NK.float().to(device), tail_N.float().to(device)
        )


def server_name(server: SignalServer) -> str:
    """The served model and the server's address."""
    return f"{server.model} at {server.base_url}"
