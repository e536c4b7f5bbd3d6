"""HTTP requests to a server, their replies, and how long to wait before the next attempt.

This uses aiohttp because local servers (vLLM, llama.cpp) answer thousands of short requests per
second, and other clients take several times as long per request as such a server does.
"""

from __future__ import annotations

import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import certifi

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BYTES = 32 << 20
"""Default limit on the bytes of a decompressed reply. A longer one is rejected."""
LONGEST_BACKOFF = 30.0
_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class Reply:
    """A server's reply. The headers' names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class LinkError(Exception):
    """No complete reply arrived. sent: whether the server may have received the request."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class LongReplyError(LinkError):
    """The reply has more bytes than allowed and is not read to its end."""


class HttpLink:
    """A connection pool to one server.

    Proxies follow the environment (https_proxy, http_proxy, no_proxy) and are never used for this
    machine. Certificates are checked against certifi's and the system's (or SSL_CERT_FILE).
    """

    def __init__(self, base_url: str, key: str | None, timeout: float, connections: int) -> None:
        import aiohttp

        headers = {"content-type": "application/json", "accept": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        parts = urlsplit(base_url)
        trusted: ssl.SSLContext | bool = True
        if parts.scheme == "https":
            trusted = ssl.create_default_context()
            trusted.load_verify_locations(certifi.where())  # some machines have none of their own
        self._base_url = base_url.rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=trusted),
            # The caller limits the time; a second timer for each request would only cost time.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            trust_env=parts.hostname not in LOOPBACK,
        )

    async def post(self, path: str, payload: Mapping[str, Any], most: int | None = None) -> Reply:
        """Send JSON to a path below the base URL, or to a complete URL on the same server.

        most: maximum bytes of the reply; None: MOST_BYTES. Redirects are not followed. Raises
        LinkError or TimeoutError. The caller limits the time, and can cancel.
        """
        import aiohttp

        url = path if "://" in path else f"{self._base_url}/{path}"
        body = _ENCODER.encode(payload).encode()
        try:
            async with self._session.post(url, data=body, allow_redirects=False) as response:
                body = await _limited(response.content.iter_any(), most or MOST_BYTES)
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status, headers, body)
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
            raise LinkError(f"cannot connect: {error}", sent=False) from error
        except (aiohttp.ClientError, ValueError) as error:
            reason = f"no complete reply: {type(error).__name__}: {error}"
            raise LinkError(reason, sent=True) from error

    async def close(self) -> None:
        await self._session.close()


async def _limited(chunks: AsyncIterator[bytes], most: int) -> bytes:
    """The complete body. Raises LongReplyError."""
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size > most:
            raise LongReplyError(f"the reply has more than {most:,} bytes", sent=True)
        parts.append(chunk)
    return b"".join(parts)


# --- after a failure ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Patience:
    """How often a request is tried, and how long to wait in between.

    attempts: per request, not counting replies with status 429. backoff: seconds before the second
    attempt, doubled for each further one; jitter spreads the requests out.
    """

    attempts: int = 6
    backoff: float = 0.5

    def wait(self, tries: int) -> float:
        longest = min(LONGEST_BACKOFF, self.backoff * 2.0 ** min(tries - 1, 16))
        return longest * random.uniform(0.5, 1.0)


PATIENCE = Patience()


def server_message(body: bytes) -> tuple[str, str | None]:
    """Extract the message and code from a server's error reply, in any of the common formats."""
    text = body.decode("utf-8", "replace").strip()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return text or "no explanation", None
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return str(error), None
    message = error.get("message") or error.get("detail") or text
    return str(message), error.get("code")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The pause in seconds that a server requests: `retry-after-ms`, or Retry-After in seconds or
    as a date (RFC 9110, 10.2.3); None if it is missing or cannot be read."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    with suppress(ValueError):
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        if value is None:
            return None
        return max(0.0, float(value))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(str(value)).timestamp() - time.time())
    return None
