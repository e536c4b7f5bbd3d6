"""Sends one request to an OpenAI-compatible endpoint and returns the answer or the failure.

Nothing is retried here: `request_pool` decides about retries.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from stillhouse.errors import EndpointError
from stillhouse.generation.budget import Price
from stillhouse.generation.request import Answer, FailureKind, Request, are_logprobs, endpoint_of
from stillhouse.teachers.api_keys import api_key, holds_key, redacted
from stillhouse.teachers.http_link import HttpLink, LinkError, Reply, retry_after, server_message

_EXCERPT = 300
"""Characters of a server's message that are kept."""
_ENDS = {
    "stop": ("eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed"),
    "length": ("max_tokens", "max_output_tokens", "model_length"),
    "content_filter": ("safety",),
    "refusal": (),
}
"""Finish reasons of an answer that is complete or was ended by the token limit or a filter, each
with the terms that other servers use for it."""
_MOST_TOKENS = 10**9
"""Maximum tokens in one prompt or answer; a larger count from a server is wrong."""


@dataclass(frozen=True)
class FailedAttempt:
    """Why one attempt got no answer.

    retry: whether another attempt may help. wait: seconds to wait before it, as requested by the
    server. billed: whether the provider may have billed an answer that did not arrive completely.
    """

    kind: FailureKind
    reason: str
    retry: bool
    wait: float | None = None
    billed: bool = False


class Client:
    """A model of an endpoint. Use it as an async context manager, inside one event loop.

    key_env: the environment variable that contains the key; None for servers without keys. The key
    is read here and goes only into the request's header. timeout: seconds from sending to the last
    byte of the answer. Raises EndpointError if the variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_env: str | None = None,
        price: Price | None = None,
        timeout: float = 120.0,
        connections: int = 64,
    ) -> None:
        self.endpoint, self.model = endpoint_of(base_url), model
        self.key_env, self.price, self.timeout = key_env, price, timeout
        self._key = api_key(key_env, where=self.endpoint, setting="api.key_env")
        self._link = HttpLink(base_url, self._key, timeout, connections)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._link.close()

    async def send(self, request: Request) -> Answer | FailedAttempt:
        """Send the request once. Raises EndpointError if no request can succeed."""
        payload = {"model": request.model, "messages": list(request.messages), **request.parameters}
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                reply = await self._link.post("chat/completions", payload)
        except TimeoutError:
            reason = f"no complete answer in {self.timeout:g} s"
            return FailedAttempt("timeout", reason, retry=True, billed=True)
        except LinkError as error:
            return FailedAttempt(
                "connection", self._excerpt(str(error)), retry=True, billed=error.sent
            )
        if reply.status == 200:
            return self._answer(reply, time.monotonic() - started)
        return self._failed_status(reply)

    def _answer(self, reply: Reply, seconds: float) -> Answer | FailedAttempt:
        try:
            document = json.loads(reply.body)
            status = _status_within(document)
            if status is not None:
                return self._failed_status(replace(reply, status=status))
            answer = _parse(document, self.price, seconds)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            start = self._excerpt(reply.body[: 2 * _EXCERPT].decode("utf-8", "replace"))
            reason = f"not a chat completion ({type(error).__name__}: {error}): {start}"
            return FailedAttempt("invalid", self._redacted(reason), retry=False, billed=True)
        answer = self._without_key(answer)
        if answer.finish_reason is None or answer.finish_reason in _ENDS:
            return answer
        # An incomplete answer, or a tool call that is never run, is not text to train on.
        reason = f"the server ended the answer with {answer.finish_reason[:_EXCERPT]!r}"
        again = "tool" not in answer.finish_reason and "function" not in answer.finish_reason
        return FailedAttempt("server" if again else "invalid", reason, retry=again, billed=True)

    def _failed_status(self, reply: Reply) -> FailedAttempt:
        status = reply.status
        if 300 <= status < 400:
            raise self._redirected(reply)
        message, code = server_message(reply.body)
        message = self._excerpt(message)
        if status in (401, 402, 403, 404) or code == "insufficient_quota":
            raise self._fatal(status, message)
        wait = retry_after(reply.headers)
        if status == 429:
            return FailedAttempt("rate_limit", message, retry=True, wait=wait)
        retry = status == 408 or status >= 500
        kind: FailureKind = "server" if retry else "refused"
        return FailedAttempt(kind, f"HTTP {status}: {message}", retry=retry, wait=wait)

    def _redirected(self, reply: Reply) -> EndpointError:
        target = self._excerpt(reply.headers.get("location", "another address"))
        return EndpointError(
            f"the endpoint redirects to {target} (HTTP {reply.status}), but prompts and the key "
            "are sent only to the recipe's address",
            where=self.endpoint,
            fix="set api.base_url to that address if you trust it",
        )

    def _fatal(self, status: int, message: str) -> EndpointError:
        variable = f"the environment variable {self.key_env}" if self.key_env else "api.key_env"
        what, fix = {
            401: ("the endpoint rejects the key", f"check {variable}"),
            403: (f"the key may not use the model {self.model!r}", f"check {variable}, and the "
                  "account's permissions"),
            404: (f"the endpoint has no model {self.model!r} or does not serve chat completions",
                  "check api.model and api.base_url, which usually ends in /v1"),
        }.get(status, ("the account has no credit left", "add credit, then repeat the same "
                       "command: answers that arrived are kept"))  # fmt: skip
        return EndpointError(f"{what} (HTTP {status}: {message})", where=self.endpoint, fix=fix)

    def _without_key(self, answer: Answer) -> Answer:
        """Remove the key from an answer that repeats it, together with the log-probabilities, whose
        tokens would also spell the key."""
        parts = (answer.text, answer.reasoning or "", answer.finish_reason or "")
        if not any(holds_key(text, self._key) for text in parts):
            return answer
        text, reasoning, finish_reason = map(self._redacted, parts)
        return replace(
            answer,
            text=text,
            reasoning=reasoning or None,
            finish_reason=finish_reason or None,
            logprobs=None,
        )

    def _excerpt(self, text: str) -> str:
        """The beginning of a server's message on one line, so that it cannot imitate our output."""
        return " ".join(self._redacted(text)[:_EXCERPT].split())

    def _redacted(self, text: str) -> str:
        return redacted(text, self._key)


def _status_within(document: Any) -> int | None:
    """The HTTP status of an error that a gateway sends with status 200, if there is one."""
    error = _object(_object(document).get("error"))
    code = str(error.get("code"))
    named = {"insufficient_quota": 402, "rate_limit_exceeded": 429, "server_error": 500}
    return int(code) if re.fullmatch("[45][0-9]{2}", code) else named.get(code)


def _parse(document: Any, price: Price | None, seconds: float) -> Answer:
    """Parse a chat completion.

    Every reply that was paid for is an answer, even an empty one; a field of the wrong type is
    ignored. Raises KeyError and similar errors if it is not a chat completion.
    """
    choices = document["choices"]
    if not isinstance(choices, list):
        raise TypeError("its choices are no list")
    choice = choices[0] if choices else {"message": {}}
    message = choice["message"]
    text, finish_reason = _text(message.get("content")), _finish_reason(choice)
    refusal = _string(message.get("refusal"))
    if not text and refusal:
        text, finish_reason = refusal, "refusal"
    usage = _object(document.get("usage"))
    prompt, completion, total = (
        _tokens(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total")
    )
    cost = None
    if prompt is None or completion is None:
        prompt = completion = None
    else:
        # Some providers bill reasoning tokens but count them only in the total.
        completion = max(completion, (total or 0) - prompt)
        cost = None if price is None else price.of(prompt, completion)
    logprobs = _object(choice.get("logprobs")).get("content")
    if isinstance(logprobs, list) and not are_logprobs(logprobs):
        raise ValueError("its log-probabilities are malformed")
    return Answer(
        text=text,
        finish_reason=finish_reason,
        reasoning=_string(message.get("reasoning_content")) or _string(message.get("reasoning")),
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=cost,
        seconds=seconds,
        logprobs=logprobs if isinstance(logprobs, list) else None,
    )


def _finish_reason(choice: Mapping[str, Any]) -> str | None:
    """The finish reason, converted to OpenAI's term if a different one is known."""
    reason = _string(choice.get("finish_reason"))
    plain = (reason or "").lower()
    return next((ours for ours, theirs in _ENDS.items() if plain in (ours, *theirs)), reason)


def _text(content: Any) -> str:
    """A message's text: a string, or the text parts of a list; empty if there is none."""
    if isinstance(content, list):
        return "".join(_string(_object(part).get("text")) or "" for part in content)
    return _string(content) or ""


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _tokens(value: Any) -> int | None:
    sane = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
    return value if sane else None
