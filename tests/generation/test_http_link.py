"""Plain HTTP/1.1: bodies of every length encoding, in pieces of every size, and truncated ones."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from stillhouse.generation.client import Client
from stillhouse.generation.http_link import HttpLink, LinkError, OpenAILink, Reply

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
    """Sends a request for each answer, one after another. Returns what came back, what the server
    got, and how many connections it saw."""
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
                found.append(await asyncio.wait_for(link.post({"n": number}), 60))
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


def test_what_is_sent() -> None:
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


def test_a_connection_that_the_server_closes_between_two_requests_is_replaced() -> None:
    closing = LENGTH.replace(b"X-Say:  hi ", b"Connection: close")
    found, _, connections = exchange([closing, LENGTH], close=False)
    assert all(isinstance(reply, Reply) for reply in found)
    assert connections == 2


def test_no_server_means_nothing_was_sent() -> None:
    async def ask() -> None:
        link = HttpLink("http://127.0.0.1:1/v1", None, 5, 1)
        try:
            await link.post({})
        finally:
            await link.close()

    with pytest.raises(LinkError) as caught:
        asyncio.run(ask())
    assert not caught.value.sent


@pytest.mark.parametrize(
    ("url", "proxies", "kind"),
    [
        ("http://127.0.0.1:8080/v1", {}, HttpLink),
        ("http://gpu-box:8000/v1", {}, HttpLink),
        ("https://api.example.org/v1", {}, OpenAILink),
        ("http://gpu-box:8000/v1", {"http_proxy": "http://proxy:3128"}, OpenAILink),
        ("http://localhost:8000/v1", {"http_proxy": "http://proxy:3128"}, HttpLink),
    ],
)
def test_plain_http_uses_aiohttp_unless_there_is_a_proxy(
    url: str, proxies: dict[str, str], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)

    async def made() -> Any:
        async with Client(url, "m") as client:
            return client._link

    assert isinstance(asyncio.run(made()), kind)
