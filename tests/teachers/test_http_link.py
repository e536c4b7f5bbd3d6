"""The HTTP/1.1 client: body encodings, split and truncated replies, HTTPS, and proxies."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from stillhouse.teachers.http_link import HttpLink, LinkError, Reply

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nX-Say:  hi \r\n\r\nhello world"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6;note=x\r\n world\r\n0\r\n"
)
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\nhello world"


def exchange(
    answers: list[bytes], *, piece: int = 1 << 20, close: bool = False, key: str | None = None
) -> tuple[list[Reply | LinkError], list[bytes], int]:
    """Sends a request for each answer, one after another. Returns the replies, the requests that
    the server received, and the number of connections."""
    got: list[bytes] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while len(got) < len(answers):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            got.append(head + await reader.readexactly(length))
            answer = answers[len(got) - 1]
            for at in range(0, len(answer), piece):
                writer.write(answer[at : at + piece])
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                break
        writer.close()

    async def whole() -> list[Reply | LinkError]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        link = HttpLink(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", key, 60, 1)
        found: list[Reply | LinkError] = []
        for number in range(len(answers)):
            try:
                reply = await asyncio.wait_for(link.post("chat/completions", {"n": number}), 60)
                found.append(reply)
            except LinkError as error:
                found.append(error)
        await link.close()
        server.close()
        return found

    return asyncio.run(whole()), got, connections


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("answer", "close"),
    [
        (LENGTH, False),
        (CHUNKED + b"\r\n", False),
        (CHUNKED + b"Trailer: x\r\n\r\n", False),
        (CONTINUED + LENGTH, False),
        (UNTIL_CLOSED, True),
    ],
    ids=["length", "chunks", "chunks with a trailer", "continue", "until closed"],
)
def test_a_body_arrives_complete(answer: bytes, close: bool, piece: int) -> None:
    found, _, connections = exchange([answer, answer], piece=piece, close=close)
    for reply in found:
        assert isinstance(reply, Reply)
        assert (reply.status, reply.body) == (200, b"hello world")
    assert connections == (2 if close else 1)


def test_header_names_are_lower_case_and_values_trimmed() -> None:
    ((reply,), _, _) = exchange([LENGTH])
    assert isinstance(reply, Reply)
    assert dict(reply.headers) == {"content-length": "11", "x-say": "hi"}


def test_a_request_has_the_path_the_key_and_a_json_body() -> None:
    _, (request,), _ = exchange([LENGTH], key="sk-1")
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"authorization: bearer sk-1" in head.lower()
    assert json.loads(body) == {"n": 0}


@pytest.mark.parametrize(
    "answer",
    [LENGTH[:-1], CHUNKED, CHUNKED[:-9], LENGTH[:20], b"", b"SSH-2.0-OpenSSH\r\n\r\n"],
    ids=["length", "no end of chunks", "inside a chunk", "inside the head", "nothing", "not HTTP"],
)
def test_truncated_or_invalid_http_is_an_error_that_may_be_billed(answer: bytes) -> None:
    ((error,), _, _) = exchange([answer], close=True)
    assert isinstance(error, LinkError)
    assert error.sent


def test_a_connection_that_the_server_closes_is_replaced_for_the_next_request() -> None:
    closing = LENGTH.replace(b"X-Say:  hi ", b"Connection: close")
    found, _, connections = exchange([closing, LENGTH], close=False)
    assert all(isinstance(reply, Reply) for reply in found)
    assert connections == 2


def test_without_a_server_the_error_says_that_nothing_was_sent() -> None:
    async def ask() -> None:
        link = HttpLink("http://127.0.0.1:1/v1", None, 5, 1)
        try:
            await link.post("chat/completions", {})
        finally:
            await link.close()

    with pytest.raises(LinkError) as caught:
        asyncio.run(ask())
    assert not caught.value.sent


CERTIFICATE = Path(__file__).with_name("localhost.pem")
"""A self-signed certificate for localhost, with its key."""


def posted(url: str) -> Reply:
    async def post() -> Reply:
        link = HttpLink(url, None, 60, 1)
        try:
            return await link.post("chat/completions", {})
        finally:
            await link.close()

    return asyncio.run(post())


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """A server in a thread: its port, and the first lines of the requests that it receives."""
    lines: list[bytes] = []
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines.append(head.partition(b"\r\n")[0])
        writer.write(LENGTH)
        await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1], lines
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


def test_requests_are_sent_over_https_to_a_server_with_a_trusted_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with serving(CERTIFICATE) as (port, lines):
        assert posted(f"https://localhost:{port}/v1").status == 200
    assert lines == [b"POST /v1/chat/completions HTTP/1.1"]


def test_nothing_is_sent_to_a_server_whose_certificate_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    untrusted = pytest.raises(LinkError, match="certificate")
    with serving(CERTIFICATE) as (port, lines), untrusted as caught:
        posted(f"https://localhost:{port}/v1")
    assert not caught.value.sent
    assert lines == []


@pytest.mark.parametrize(
    ("host", "no_proxy", "proxied"),
    [("gpu-box.invalid", "", True), ("127.0.0.1", "", False), ("gpu-box.invalid", "*", False)],
)
def test_the_environment_decides_whether_a_proxy_is_used(
    host: str, no_proxy: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", no_proxy)
    with serving() as (port, lines):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with suppress(LinkError):
            posted(f"http://{host}:1/v1")
    target = f"POST http://{host}:1/v1/chat/completions HTTP/1.1".encode()
    assert lines == ([target] if proxied else [])
