"""How one request's bytes reach an endpoint, and the answer's come back.

Two ways with one shape. `OpenAILink` is the openai client: TLS, proxies, whatever a provider
needs. `DirectLink` speaks plain HTTP/1.1 to a server of one's own, vLLM or llama.cpp beside this
process, which answers thousands of short requests a second; the client's general machinery takes
several times as long for a request as such a server does (bench/synthesis).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import openai

_MOST_HEAD_BYTES = 1 << 16
_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class Reply:
    """headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class LinkError(Exception):
    """No whole reply. sent: whether the server may have got the request."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class Link(Protocol):
    """May raise LinkError and TimeoutError; a caller sets the time limit, and may cancel."""

    async def post(self, payload: dict[str, Any]) -> Reply: ...

    async def close(self) -> None: ...


class OpenAILink:
    """The openai client, which never retries here."""

    def __init__(self, base_url: str, key: str | None, timeout: float, connections: int) -> None:
        import httpx2
        import openai

        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout)
        self._client: openai.AsyncOpenAI = openai.AsyncOpenAI(
            # An empty key is refused by the client; servers that want none ignore this one.
            api_key=key or "none",
            base_url=base_url,
            max_retries=0,
            http_client=http,
        )

    async def post(self, payload: dict[str, Any]) -> Reply:
        import openai

        try:
            raw = await self._client.chat.completions.with_raw_response.create(
                model=payload["model"],
                messages=payload["messages"],
                extra_body={k: v for k, v in payload.items() if k not in ("model", "messages")},
            )
        except openai.APITimeoutError as error:
            raise TimeoutError from error
        except openai.APIStatusError as error:
            response = error.response
            return Reply(response.status_code, response.headers, response.content)
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            sent = type(cause).__name__ != "ConnectError"
            raise LinkError(f"{type(cause).__name__}: {cause}", sent=sent) from error
        return Reply(raw.status_code, raw.headers, raw.content)

    async def close(self) -> None:
        await self._client.close()


class DirectLink:
    """Keeps as many connections open as were ever used at once."""

    def __init__(self, host: str, port: int, path: str, key: str | None) -> None:
        self._host, self._port = host, port
        name = f"[{host}]" if ":" in host else host
        lines = [f"POST {path}/chat/completions HTTP/1.1", f"host: {name}:{port}"]
        lines += ["content-type: application/json", "accept: application/json"]
        lines += [f"authorization: Bearer {key}"] if key else []
        self._head = "\r\n".join([*lines, "content-length: "]).encode("latin-1")
        self._idle: list[_Connection] = []

    async def post(self, payload: dict[str, Any]) -> Reply:
        body = _ENCODER.encode(payload).encode()
        connection = await self._connection()
        try:
            reply = await connection.exchange(self._head + b"%d\r\n\r\n" % len(body) + body)
        except BaseException:
            connection.abort()  # what may still arrive answers nothing that will be asked
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.abort()
        return reply

    async def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        try:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
        except OSError as error:
            raise LinkError(f"cannot connect: {error}", sent=False) from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time (RFC 9112)."""

    def __init__(self) -> None:
        self.reusable = True
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Reply] | None = None
        self._received = bytearray()
        self._head: tuple[int, dict[str, str], int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def exchange(self, request: bytes) -> Reply:
        assert self._transport is not None
        self._received.clear()
        self._head = None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def abort(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():
            self.abort()  # nothing was asked
            return
        self._received += data
        try:
            reply = self._parse(at_end=False)
        except ValueError as error:
            self._waiting.set_exception(LinkError(f"not HTTP/1.1: {error}", sent=True))
            self.abort()
            return
        if reply is not None:
            self._waiting.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._waiting is None or self._waiting.done():
            return
        try:
            reply = self._parse(at_end=True)
        except ValueError:
            reply = None
        if reply is not None:
            self._waiting.set_result(reply)
        else:
            reason = f"the connection was lost before the answer was whole ({error or 'closed'})"
            self._waiting.set_exception(LinkError(reason, sent=True))

    def _parse(self, *, at_end: bool) -> Reply | None:
        """The reply if it is whole. at_end: the server has closed the connection."""
        if self._head is None:
            self._head = _head(self._received)
            if self._head is None:
                return None
            if self._head[1].get("connection", "").lower() == "close":
                self.reusable = False
        status, headers, start = self._head
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body = _unchunked(self._received, start)
        elif "content-length" in headers:
            end = start + int(headers["content-length"])
            body = bytes(self._received[start:end]) if len(self._received) >= end else None
        else:
            self.reusable = False
            body = bytes(self._received[start:]) if at_end else None
        return None if body is None else Reply(status, headers, body)


def _head(received: bytearray) -> tuple[int, dict[str, str], int] | None:
    """Status, headers, and where the body begins; None where they are not all there."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        if len(received) > _MOST_HEAD_BYTES:
            raise ValueError("its headers do not end")
        return None
    first, *lines = received[:end].decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(repr(first[:40]))
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if rest.startswith("1"):  # 100 Continue and its like: the reply comes after it
        del received[: end + 4]
        return _head(received)
    return int(rest[:3]), headers, end + 4


def _unchunked(received: bytearray, at: int) -> bytes | None:
    """The body out of its chunks, or None where the last one is not there; trailers dropped."""
    body = bytearray()
    while True:
        line_end = received.find(b"\r\n", at)
        if line_end < 0:
            return None
        size = int(bytes(received[at:line_end]).partition(b";")[0], 16)
        at = line_end + 2
        if size == 0:
            whole = received.startswith(b"\r\n", at) or received.find(b"\r\n\r\n", at) >= 0
            return bytes(body) if whole else None
        if len(received) < at + size + 2:
            return None
        body += received[at : at + size]
        at += size + 2
