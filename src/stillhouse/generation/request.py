"""Requests to a text teacher, its answers, and the key that identifies a request.

A request is identified by exactly what determines its answer: the endpoint, the model, the
messages, the sampling parameters, and the sample number. API keys and the user name and password in
a URL are not part of it, so they cannot end up in a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit

from stillhouse.generation.generation_config import ApiTeacher
from stillhouse.teachers.model_source import ModelSource

Message = Mapping[str, Any]

_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Request:
    """A request for one chat completion.

    endpoint: as returned by `endpoint_of`, or `local` or `vllm`. model: the endpoint's name for the
    model, or the fingerprint of a local model. parameters: sent in addition to the messages, e.g.
    temperature. sample: 0, 1, ... if a prompt is answered several times.
    """

    endpoint: str
    model: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical JSON of all five fields, as a hexadecimal string."""
        facts = {
            "endpoint": self.endpoint,
            "model": self.model,
            "messages": [dict(message) for message in self.messages],
            "parameters": dict(self.parameters),
            "sample": self.sample,
        }
        return hashlib.sha256(_CANONICAL.encode(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """A reply. Fields are None if the server did not return them.

    reasoning: if the server returned it separately from the text. cost: in US dollars; None if the
    price is unknown. seconds: from sending to the last byte, not counting retries. logprobs: a JSON
    list with one entry per token, as returned by the server.
    """

    text: str
    finish_reason: str | None = None
    reasoning: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    seconds: float = 0.0
    logprobs: list[Any] | None = None


def are_logprobs(content: Sequence[Any]) -> bool:
    """Whether these are log-probabilities in the format of OpenAI's API: for each token, its text,
    its log-probability, optionally its bytes, and alternatives."""
    return all(
        _is_token(entry) and all(map(_is_token, entry.get("top_logprobs") or []))
        for entry in content
    )


def is_logprob(value: Any) -> bool:
    """Whether the value is a number that is at most 0, up to rounding."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == -math.inf or -_LARGEST <= value <= 1e-2


def _is_token(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return False
    logprob, raw = entry.get("logprob"), entry.get("bytes")
    if not is_logprob(logprob):
        return False
    if raw is not None and not isinstance(raw, list):
        return False
    if not all(type(one) is int and 0 <= one < 256 for one in raw or []):
        return False
    return isinstance(entry.get("top_logprobs") or [], list)


FailureKind = Literal["rate_limit", "server", "timeout", "connection", "refused", "invalid"]


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer.

    kind: `refused` is a 4xx for this request only, and `invalid` a reply that is not a chat
    completion. attempts: how often it was sent. cost, tokens: the most that may have been billed
    for attempts without an answer.
    """

    kind: FailureKind
    reason: str
    attempts: int = 1
    cost: float | None = None
    tokens: int = 0


Outcome = Answer | Failure

Requests = Callable[[], Iterator[Request]]
"""Returns the same requests on each call, because they are read lazily and more than once."""


def endpoint_of(base_url: str) -> str:
    """The URL without user, password, query, and trailing slash: safe to write to a file."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def api_described(api: ApiTeacher) -> str:
    """An API's model, as named in manifests and reports."""
    return f"{api.model} at {endpoint_of(api.base_url)}"


def teacher_described(api: ApiTeacher | None, model: ModelSource | None) -> str:
    """A task's teacher, which is either an API or a model, as named in manifests and reports."""
    if api is not None:
        return api_described(api)
    assert model is not None
    return model.described
