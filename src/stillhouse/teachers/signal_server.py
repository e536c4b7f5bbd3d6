"""The connection to a server that scores prompts: several documents in a request, bounded replies,
and one message for each failure."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from stillhouse.errors import ModelError
from stillhouse.event_loop import run_stoppable
from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.api_keys import api_key
from stillhouse.teachers.http_link import (
    PATIENCE,
    HttpLink,
    LinkError,
    LongReplyError,
    Reply,
    retry_after,
    server_message,
)
from stillhouse.teachers.redact import redacted

LONGEST_WAIT = 60.0
"""Seconds that a server may request before the next attempt."""
TIMEOUT_SECONDS = 600.0
EXCERPT = 300
"""Characters of a server's words that are shown."""
RESUMED = "what is recorded is kept: run the same command to resume"

T = TypeVar("T")
Post = Callable[[str, Mapping[str, Any], int], Coroutine[Any, Any, bytes]]
"""(path or URL, JSON, most bytes of the reply) → the complete reply."""


class SignalLink:
    """missing: what a server with status 404 lacks. rejected: what to do if it rejects a request.
    section: the recipe's key. Raises EndpointError: the key's variable is not set."""

    def __init__(
        self,
        server: SignalServer,
        *,
        missing: str,
        rejected: str,
        section: str = "signals.server",
    ) -> None:
        self.server, self.described = server, server_name(server)
        self.root = server.base_url.rstrip("/").removesuffix("/v1")
        self._missing, self._rejected, self._section = missing, rejected, section
        self._key = api_key(server.key_env, where=self.described, setting=f"{section}.key_env")

    def each(
        self, items: Sequence[T], send: Callable[[Post, T], Coroutine[Any, Any, Any]]
    ) -> list[Any]:
        """The results for all items; `concurrency` requests are under way at a time."""
        return run_stoppable(self._each(items, send))

    def error(self, what: str, fix: str) -> ModelError:
        """The key may be in a server's words, which may be of any length and in several lines."""
        what = " ".join(redacted(what, self._key).split())
        if len(what) > 2 * EXCERPT:
            what = f"{what[: 2 * EXCERPT]}..."
        return ModelError(what, where=self.described, fix=f"{fix}; {RESUMED}")

    async def _each(
        self, items: Sequence[T], send: Callable[[Post, T], Coroutine[Any, Any, Any]]
    ) -> list[Any]:
        free, server = asyncio.Semaphore(self.server.concurrency), self.server
        link = HttpLink(server.base_url, self._key, TIMEOUT_SECONDS, server.concurrency)

        async def post(path: str, body: Mapping[str, Any], most: int) -> bytes:
            async with free:
                return await self._post(link, path, body, most)

        try:
            return await asyncio.gather(*(send(post, item) for item in items))
        finally:
            await link.close()

    async def _post(self, link: HttpLink, path: str, body: Mapping[str, Any], most: int) -> bytes:
        """A complete reply, after as many attempts as `PATIENCE` has."""
        for tries in itertools.count(1):
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
                    raise self.error(what, "start it, or see its log") from error
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
                f"the server redirects to {target}; prompts and the key are sent to no other "
                "address than the recipe's",
                f"set {self._section}.base_url to that address, if you trust it",
            )
        if status in (401, 403):
            return self.error(
                f"the server rejects the key ({status}: {message})",
                f"put a valid key into the environment variable of {self._section}.key_env",
            )
        if status == 404:
            return self.error(
                f"the server has no such model or no {self._missing}: {message}",
                f"compare {self._section} with what GET base_url/models lists; {self._rejected}",
            )
        return self.error(f"the server rejects the request ({status}): {message}", self._rejected)


def server_name(server: SignalServer) -> str:
    """The served model and the server's address."""
    return f"{server.model} at {server.base_url}"


def divide(prompts: Sequence[T], lengths: Sequence[int], tokens: int, least: int) -> list[list[T]]:
    """The prompts, in order, in parts of about equally many tokens: at most `tokens`, roughly, and
    in at least `least` parts, if there are so many prompts."""
    if not prompts:
        return []
    size = sum(lengths) / max(least, -(-sum(lengths) // tokens))
    parts: dict[int, list[T]] = {}
    start = 0
    for prompt, length in zip(prompts, lengths, strict=True):
        parts.setdefault(int((start + length / 2) / size), []).append(prompt)
        start += length
    return list(parts.values())
