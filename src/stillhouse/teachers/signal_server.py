"""A connection to a server that scores prompts, with batched requests, bounded replies, and clear
errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from itertools import chain, count
from typing import Any, TypeVar

from stillhouse.errors import ModelError
from stillhouse.event_loop import run_stoppable
from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.api_keys import api_key, redacted
from stillhouse.teachers.http_link import (
    PATIENCE,
    HttpLink,
    LinkError,
    LongReplyError,
    Reply,
    retry_after,
    server_message,
)

LONGEST_WAIT = 60.0
"""Longest pause in seconds that a server can request before the next attempt."""
TIMEOUT_SECONDS = 600.0
EXCERPT = 300
"""Number of characters of a server's message that are shown."""
RESUMED = "recorded signals are kept: run the same command again to resume"

T = TypeVar("T")
Post = Callable[[str, Mapping[str, Any], int], Coroutine[Any, Any, bytes]]
"""(path or URL, JSON, maximum bytes of the reply) → the complete reply."""


class SignalLink:
    """Sends requests to a server.

    missing: what a server that returns status 404 lacks. rejected: the fix if it rejects a request.
    section: the server's key in the recipe. Raises EndpointError: the environment variable with the
    API key is not set.
    """

    def __init__(
        self, server: SignalServer, *, missing: str, rejected: str, section: str = "signals.server"
    ) -> None:
        self.server, self.described = server, f"{server.model} at {server.base_url}"
        self.root = server.base_url.rstrip("/").removesuffix("/v1")
        self._missing, self._rejected, self._section = missing, rejected, section
        self._key = api_key(server.key_env, where=self.described, setting=f"{section}.key_env")

    def each(
        self, items: Sequence[T], send: Callable[[Post, T], Coroutine[Any, Any, Any]]
    ) -> list[Any]:
        """Call `send` for all items, with `concurrency` requests at a time, and return the
        results."""

        async def send_all() -> list[Any]:
            free, server = asyncio.Semaphore(self.server.concurrency), self.server
            link = HttpLink(server.base_url, self._key, TIMEOUT_SECONDS, server.concurrency)

            async def post(path: str, body: Mapping[str, Any], most: int) -> bytes:
                async with free:
                    return await self._post(link, path, body, most)

            try:
                return await asyncio.gather(*(send(post, item) for item in items))
            finally:
                await link.close()

        return run_stoppable(send_all())

    def each_prompt(
        self,
        prompts: Sequence[list[int]],
        tokens: int,
        send: Callable[[Post, list[list[int]]], Coroutine[Any, Any, list[Any]]],
    ) -> list[Any]:
        """Call `send` for parts of the prompts, in order, and return one result for each prompt.

        The parts have about equal numbers of tokens, at most about `tokens`, and there are at least
        `concurrency` of them if there are that many prompts.
        """
        total = sum(map(len, prompts))
        size = total / max(self.server.concurrency, -(-total // tokens))
        parts: dict[int, list[list[int]]] = {}
        start = 0
        for prompt in prompts:
            parts.setdefault(int((start + len(prompt) / 2) / size), []).append(prompt)
            start += len(prompt)
        return list(chain.from_iterable(self.each(list(parts.values()), send)))

    def error(self, what: str, fix: str) -> ModelError:
        """An error with a server's message, on one line, shortened, and without the API key."""
        what = " ".join(redacted(what, self._key).split())
        if len(what) > 2 * EXCERPT:
            what = f"{what[: 2 * EXCERPT]}..."
        return ModelError(what, where=self.described, fix=f"{fix}; {RESUMED}")

    async def _post(self, link: HttpLink, path: str, body: Mapping[str, Any], most: int) -> bytes:
        """Return a complete reply, after at most PATIENCE.attempts attempts."""
        for tries in count(1):
            wait = 0.0
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    reply = await link.post(path, body, most)
            except LongReplyError as error:
                fix = f"check {self._section}.base_url"
                raise self.error(f"the server's reply has more than {most:,} bytes", fix) from error
            except (LinkError, TimeoutError) as error:
                if tries == PATIENCE.attempts:
                    reason = str(error) or f"no complete reply in {TIMEOUT_SECONDS:g} s"
                    what = f"the server cannot be reached, or its reply ended early ({reason})"
                    raise self.error(what, "start the server, or check its log") from error
            else:
                if reply.status == 200:
                    return reply.body
                wait = retry_after(reply.headers) or 0.0
                busy = reply.status in (408, 409, 429) or reply.status >= 500
                if not busy or tries == PATIENCE.attempts or wait > LONGEST_WAIT:
                    raise self._status(reply)
            await asyncio.sleep(max(wait, PATIENCE.wait(tries)))
        raise AssertionError

    def _status(self, reply: Reply) -> ModelError:
        status, (message, _) = reply.status, server_message(reply.body)
        if 300 <= status < 400:
            target = reply.headers.get("location", "another address")
            return self.error(
                f"the server redirects to {target}, but prompts and the key are sent only to the "
                "recipe's address",
                f"set {self._section}.base_url to that address if you trust it",
            )
        if status in (401, 403):
            return self.error(
                f"the server rejects the key ({status}: {message})",
                f"put a valid key into the environment variable of {self._section}.key_env",
            )
        if status == 404:
            return self.error(
                f"the server has no such model, or no {self._missing}: {message}",
                f"compare {self._section} with the models that GET base_url/models lists; "
                f"{self._rejected}",
            )
        return self.error(f"the server rejects the request ({status}): {message}", self._rejected)
