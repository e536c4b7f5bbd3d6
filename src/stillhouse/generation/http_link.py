"""HTTP: one request to an endpoint, and the reply.

`OpenAILink` is the openai client: TLS, proxies, whatever a provider needs. `HttpLink` is for local
servers (vLLM, llama.cpp), which answer thousands of short requests per second; the openai client
takes several times as long for a request as such a server does (bench/synthesis).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import openai

MOST_BYTES = 32 << 20
"""Maximum bytes of a decompressed reply. A longer one is not an answer."""
_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class Reply:
    """headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class LinkError(Exception):
    """No complete reply. sent: whether the server may have received the request."""

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
        http = openai.DefaultAsyncHttpxClient(
            limits=limits, timeout=timeout, follow_redirects=False
        )
        self._client: openai.AsyncOpenAI = openai.AsyncOpenAI(
            # The client rejects an empty key; servers without keys ignore this one.
            api_key=key or "none",
            base_url=base_url,
            max_retries=0,
            http_client=http,
        )

    async def post(self, payload: dict[str, Any]) -> Reply:
        import httpx2
        import openai

        try:
            async with self._client.chat.completions.with_streaming_response.create(
                model=payload["model"],
                messages=payload["messages"],
                extra_body={k: v for k, v in payload.items() if k not in ("model", "messages")},
            ) as raw:
                body = await _limited(raw.iter_bytes())
                return Reply(raw.status_code, raw.headers, body)
        except openai.APITimeoutError as error:
            raise TimeoutError from error
        except openai.APIStatusError as error:
            response = error.response
            return Reply(response.status_code, response.headers, response.content)
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            sent = type(cause).__name__ != "ConnectError"
            raise LinkError(f"{type(cause).__name__}: {cause}", sent=sent) from error
        except httpx2.TimeoutException as error:  # while the body is read
            raise TimeoutError from error
        except httpx2.HTTPError as error:
            reason = f"no complete answer: {type(error).__name__}: {error}"
            raise LinkError(reason, sent=True) from error

    async def close(self) -> None:
        await self._client.close()


class HttpLink:
    """aiohttp, for plain HTTP: much faster than the openai client for short requests."""

    def __init__(self, base_url: str, key: str | None, timeout: float, connections: int) -> None:
        import aiohttp

        headers = {"content-type": "application/json", "accept": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections),
            # The caller's limit is the one that counts; a second timer a request takes time too.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
        )

    async def post(self, payload: dict[str, Any]) -> Reply:
        import aiohttp

        body = _ENCODER.encode(payload).encode()
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False) as response:
                body = await _limited(response.content.iter_any())
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status, headers, body)
        except aiohttp.ClientConnectorError as error:
            raise LinkError(f"cannot connect: {error}", sent=False) from error
        except (aiohttp.ClientError, ValueError) as error:
            reason = f"no complete answer: {type(error).__name__}: {error}"
            raise LinkError(reason, sent=True) from error

    async def close(self) -> None:
        await self._session.close()


async def _limited(chunks: AsyncIterator[bytes]) -> bytes:
    """The complete body. Raises LinkError if it is too long."""
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size > MOST_BYTES:
            raise LinkError(f"the reply has more than {MOST_BYTES >> 20} MiB", sent=True)
        parts.append(chunk)
    return b"".join(parts)
