"""A teacher behind an OpenAI-compatible server that returns log-probabilities of prompts.

vLLM's completions take token ids as the prompt and, with `prompt_logprobs: k`, give for each token
of it the k likeliest tokens of that position, by id, and the token itself.

Shapes: L tokens of a segment, N supervised tokens, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
from numpy.typing import NDArray

from stillhouse.data.shift import IGNORED
from stillhouse.errors import ModelError
from stillhouse.signals.encode import Statistics
from stillhouse.signals.encoded_rows import EntryRows, split_ids
from stillhouse.signals.encodings import TopK
from stillhouse.signals.manifest import Settings
from stillhouse.signals.segments import Segments
from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.api_keys import api_key
from stillhouse.teachers.record_store import Ask, Batch, Encoded

RETRIES = 6
"""Of a request that the server was too busy for, or that was cut off; with growing pauses."""
TIMEOUT_SECONDS = 600.0
OVER_ONE = 1e-3
"""By how much the probabilities of a row may pass 1, being rounded."""
ASKED_TOGETHER = 1 << 16
"""Tokens of one round of requests: a killed process loses the answers of one round."""
LEAST = float(np.finfo(np.float16).min)
KEPT = "what is recorded is kept: the same command goes on from there"


def server_teacher(section: SignalServer, settings: Settings) -> Ask:
    """Asks the server about each segment, some of them at a time.

    Raises EndpointError: the key's variable is not set. The answer's calls raise ModelError where
    the server refuses, cannot be reached, or returns something else than was asked for.
    """
    assert isinstance(settings.encoding, TopK)
    key = api_key(section.key_env, where=server_name(section), setting="signals.server.key_env")
    client = openai.OpenAI(
        base_url=section.base_url,
        api_key=key or "none",  # the client insists on one; servers without keys ignore it
        max_retries=RETRIES,
        timeout=TIMEOUT_SECONDS,
    )
    k, vocabulary = settings.encoding.k, settings.vocabulary

    def score(ids_L: Sequence[int]) -> list[Any]:
        return _prompt_log_probabilities(client, section, ids_L, k)

    def ask(batch: Batch, segments: Segments, wanted_S: NDArray[np.bool_]) -> Encoded:
        ids = batch["input_ids"].flatten().tolist()
        supervised = (batch["labels"].flatten() != IGNORED).tolist()
        spans = segments.only(wanted_S).spans
        with ThreadPoolExecutor(section.concurrency) as pool:
            answers = list(pool.map(score, [ids[start:end] for start, end in spans]))
        rows = []
        for (start, end), answer in zip(spans, answers, strict=True):
            for at in range(start + 1, end):
                if supervised[at]:
                    rows.append(_row(answer[at - start], ids[at], k, vocabulary, section))
        return _encode(rows, vocabulary)

    return ask


def server_name(section: SignalServer) -> str:
    return f"{section.model} at {section.base_url}"


def _prompt_log_probabilities(
    client: openai.OpenAI, section: SignalServer, ids_L: Sequence[int], k: int
) -> list[Any]:
    """For each token of the prompt, its position's {token id: {"logprob": ...}}; None for the
    first."""
    where = server_name(section)
    try:
        completion = client.completions.create(
            model=section.model,
            prompt=list(ids_L),
            max_tokens=1,
            temperature=0.0,
            extra_body={"prompt_logprobs": k},
        )
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise ModelError(
            "the server refuses the key",
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
            f"the server refuses ({error.status_code}): {error.message}",
            where=where,
            fix=f"a k of more than 20 needs vLLM started with --max-logprobs {k}; {KEPT}",
        ) from error
    except openai.APIConnectionError as error:
        raise ModelError(
            f"the server cannot be reached ({error})", where=where, fix=f"start it; {KEPT}"
        ) from error
    choice = completion.choices[0].model_extra if completion.choices else None
    found = (choice or {}).get("prompt_logprobs")
    if not isinstance(found, list) or len(found) != len(ids_L):
        length = len(found) if isinstance(found, list) else "no"
        raise ModelError(
            f"the server returns {length} prompt_logprobs for a prompt of {len(ids_L)} tokens",
            where=where,
            fix="use a server that has prompt_logprobs for prompts of token ids (vLLM)",
        )
    return found


def _row(
    position: Any, token: int, k: int, vocabulary: int, section: SignalServer
) -> tuple[list[int], list[float]]:
    """The k likeliest tokens of a position, and their log-probabilities."""
    where = server_name(section)
    if not isinstance(position, Mapping) or str(token) not in position:
        raise ModelError(
            f"the answer about token {token} does not have that token",
            where=where,
            fix="the server must have the teacher's own tokenizer, and return token ids",
        )
    found = sorted(((float(v["logprob"]), int(i)) for i, v in position.items()), reverse=True)[:k]
    log_probs, ids = [max(p, LEAST) for p, _ in found], [i for _, i in found]
    total = float(np.exp(log_probs).sum())
    if len(found) < k or max(ids) >= vocabulary or not total <= 1.0 + OVER_ONE:
        raise ModelError(
            f"the answer has {len(found)} tokens up to id {max(ids)} of mass {total:.4f}; "
            f"asked for were {k} of a vocabulary of {vocabulary:,}",
            where=where,
            fix="check that the server has the teacher of the recipe, at temperature 1",
        )
    return ids, log_probs


def _encode(rows: Sequence[tuple[list[int], list[float]]], vocabulary: int) -> Encoded:
    """As `top_k` of a local teacher's logits."""
    ids_NK = np.array([ids for ids, _ in rows], dtype=np.int64)
    log_p_NK = np.array([log_probs for _, log_probs in rows], dtype=np.float64)
    mass_N = np.exp(log_p_NK).sum(1)
    low_E, high_E = split_ids(ids_NK.ravel(), vocabulary)
    encoded = EntryRows(
        counts_N=np.full(len(rows), ids_NK.shape[1], dtype=np.uint8),
        valued_N=None,
        low_E=low_E,
        high_E=high_E,
        values_X=log_p_NK.ravel().astype("<f2"),
        tail_N=(1.0 - mass_N).clip(0.0, 1.0).astype("<f4"),
    )
    return encoded, Statistics(mass=float(mass_N.clip(max=1.0).sum()))
