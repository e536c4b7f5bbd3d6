"""A chat-completions server that misbehaves on demand, based only on the standard library.

A script decides how each request is answered. `Stub` runs the server in a thread of the test's
process; `python -m tests.generation.stub` runs it in a separate process, for the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Reply:
    """How one request is answered.

    body: the response body; None: a chat completion with `text`. raw: bytes to send instead of a
    response, including its headers; the connection is then closed. when: the reply is held back
    until this returns True. delay: seconds before the first byte. how: `hang` never answers; `cut`
    closes the connection in the middle of the body; `trickle` sends the body one byte at a time, so
    slowly that it never ends.
    """

    text: str = "an answer"
    status: int = 200
    body: bytes | None = None
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    when: Callable[[], bool] = lambda: True
    delay: float = 0.0
    how: Literal["whole", "hang", "cut", "trickle"] = "whole"
    finish_reason: str = "stop"
    usage: tuple[int, int] | None = (10, 5)
    message: dict[str, Any] = field(default_factory=dict)
    logprobs: list[Any] | None = None


Script = Callable[[int, dict[str, Any]], Reply]


def error(status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    body = json.dumps({"error": {"message": message, **more}}).encode()
    return Reply(status=status, body=body, headers=headers or {})


def completion(reply: Reply, model: str) -> bytes:
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text, **reply.message},
        "finish_reason": reply.finish_reason,
    }
    if reply.logprobs is not None:
        choice["logprobs"] = {"content": reply.logprobs}
    whole: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": model}
    whole["choices"] = [choice]
    if reply.usage is not None:
        prompt, answer = reply.usage
        whole["usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }
    return json.dumps(whole).encode()


class Stub:
    """The server; use it as a context manager.

    key: the expected bearer token. models: the names of the models that it serves. read: the
    payloads whose answers have certainly been received, because the client has sent another request
    over the same connection.
    """

    def __init__(
        self,
        script: Script = lambda number, payload: Reply(),
        *,
        key: str | None = None,
        models: tuple[str, ...] = ("teacher",),
    ) -> None:
        self.script, self.key, self.models = script, key, models
        self.payloads: list[dict[str, Any]] = []
        self.read: list[dict[str, Any]] = []
        self.now = self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            self._loop.create_server(lambda: _Connection(self), HOST, 0, backlog=1024)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.close()

    def reply(self, headers: str, payload: dict[str, Any]) -> Reply:
        if self.key is not None and f"bearer {self.key}".lower() not in headers.lower():
            return error(401, f"Incorrect API key provided: {headers}", code="invalid_api_key")
        if payload.get("model") not in self.models:
            return error(404, f"The model {payload.get('model')!r} does not exist")
        self.payloads.append(payload)
        return self.script(len(self.payloads) - 1, payload)


class _Connection(asyncio.Protocol):
    def __init__(self, stub: Stub) -> None:
        self.stub, self.received = stub, b""
        self.answered: dict[str, Any] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, rest = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        headers = head.decode("latin-1")
        length = int(headers.lower().partition("content-length:")[2].partition("\r\n")[0] or 0)
        if len(rest) < length:
            return
        self.received = rest[length:]
        if self.answered is not None:
            self.stub.read.append(self.answered)
            self.answered = None
        payload = json.loads(rest[:length])
        reply = self.stub.reply(headers, payload)
        self.stub.now += 1
        self.stub.most_at_once = max(self.stub.most_at_once, self.stub.now)
        if reply.how == "hang":
            return
        self.wait(reply, payload)

    def wait(self, reply: Reply, payload: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        if reply.when():
            loop.call_later(reply.delay, self.send, reply, payload)
        else:
            loop.call_later(0.005, self.wait, reply, payload)

    def send(self, reply: Reply, payload: dict[str, Any]) -> None:
        self.stub.now -= 1
        self.answered = payload
        if reply.raw is not None:
            self.transport.write(reply.raw)
            self.transport.close()
            return
        body = completion(reply, str(payload.get("model"))) if reply.body is None else reply.body
        lines = [f"HTTP/1.1 {reply.status} X", f"content-length: {len(body)}"]
        lines += ["content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if reply.how == "whole":
            self.transport.write(head + body)
        elif reply.how == "cut":
            self.transport.write(head + body[: len(body) // 2])
            self.transport.close()
        else:
            self.transport.write(head)
            self.trickle(body)

    def trickle(self, body: bytes) -> None:
        if len(body) > 1 and not self.transport.is_closing():
            self.transport.write(body[:1])
            asyncio.get_running_loop().call_later(0.05, self.trickle, body[1:])


def main() -> None:
    """Prints the URL and serves until standard input is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.05)
    options = parser.parse_args()
    reply = Reply(delay=options.latency)
    with Stub(lambda number, payload: reply) as stub:
        print(stub.url, flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main()
