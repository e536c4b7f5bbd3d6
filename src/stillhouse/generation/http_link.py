"""HTTP: one request to an endpoint, and the reply.

aiohttp, since local servers (vLLM, llama.cpp) answer thousands of short requests per second, which
other clients take several times as long for as such a server does.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import certifi

LOOPBACK = ("127.0.0.1", "localhost", "::1")
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


class HttpLink:
    """A connection pool to one endpoint.

    A proxy is used as the environment says (https_proxy, http_proxy, no_proxy), and never for this
    machine. Certificates are checked against those of the system, or of SSL_CERT_FILE, and certifi.
    """

    def __init__(self, base_url: str, key: str | None, timeout: float, connections: int) -> None:
        import aiohttp

        headers = {"content-type": "application/json", "accept": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        parts = urlsplit(base_url)
        trusted = _trusted_certificates() if parts.scheme == "https" else True
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=trusted),
            # The caller's limit is the one that counts; a second timer a request takes time too.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            trust_env=parts.hostname not in LOOPBACK,
        )

    async def post(self, payload: dict[str, Any]) -> Reply:
        """Raises LinkError and TimeoutError; a caller sets the time limit, and may cancel."""
        import aiohttp

        body = _ENCODER.encode(payload).encode()
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False) as response:
                body = await _limited(response.content.iter_any())
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status, headers, body)
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
            raise LinkError(f"cannot connect: {error}", sent=False) from error
        except (aiohttp.ClientError, ValueError) as error:
            reason = f"no complete answer: {type(error).__name__}: {error}"
            raise LinkError(reason, sent=True) from error

    async def close(self) -> None:
        await self._session.close()


def _trusted_certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())  # some machines have none of their own
    return context


async def _limited(chunks: AsyncIterator[bytes]) -> bytes:
    """The complete body. Raises LinkError if it is too long."""
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size > MOST_BYTES:
            raise LinkError(f"the reply has more than {MOST_BYTES >> 20} MiB", sent=True)
        parts.append(chunk)
    return b"".join(parts)
