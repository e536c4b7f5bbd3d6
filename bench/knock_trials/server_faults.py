"""Invalid replies from a server of chat completions."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from tests.generation.stub import Reply

HALF = "half of an answer"
KEY = "sk-live/Ab+9_z&Qx==7f3c"


@dataclass(frozen=True)
class Fault:
    """A faulty reply. reply: makes it from the right text. texts: stored answers that are allowed
    besides the right one. billed: whether the provider bills the usual tokens."""

    name: str
    reply: Callable[[str], Reply]
    texts: tuple[str, ...] = ()
    billed: bool = True


def whole(text: str, **choice: Any) -> dict[str, Any]:
    first = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        **choice,
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"id": "x", "object": "chat.completion", "choices": [first], "usage": usage}


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def body(data: bytes, status: int = 200, **headers: str) -> Reply:
    return Reply(
        status=status, body=data, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


# --- bodies ------------------------------------------------------------------------------------


def malformed(chance: random.Random) -> Fault:
    good = dumps(whole(HALF))
    data = chance.choice(
        [
            b"", b"null", b"[]", b"7", b'"text"', b"{", b"\xff\xfe\x00", b"\xef\xbb\xbf", b"{}",
            b"<html><body>Bad gateway</body></html>", good[: len(good) // 2], good[:-1],
            good + b"}", b"data: " + good + b"\n\ndata: [DONE]\n\n", b'{"choices": 7}',
            b'{"choices": null}',
            b'{"choices": {"0": 1}}', b'{"choices": ["text"]}', b'{"choices": [null]}',
            b'{"choices": [{"message": "text"}]}', b'{"choices": [{"message": [1]}]}',
            b'{"choices": [{"text": "old completion"}]}', b"NaN", b'{"choices": NaN}',
            b'{"error": "overloaded"}', b'{"error": {"code": [1]}}', b'{"error": {"code": {}}}',
            b'{"error": {"message": {"a": 1}}}', b"9" * 5000, b'{"n": ' + b"9" * 5000 + b"}",
            good.replace(b'"stop"', b'"stop'), good.replace(b"choices", b"choices\\ud800"),
        ]
    )  # fmt: skip
    return Fault(f"malformed {data[:40]!r}", lambda text: body(data))


def empty(chance: random.Random) -> Fault:
    """A complete answer without text, which is billed."""
    content: Any = chance.choice([None, "", 7, [], {}, [{"type": "image"}], True, [7]])
    value = chance.choice([{"choices": []}, whole("", message={"content": content})])
    return Fault(f"empty {content!r}", lambda text: body(dumps(value)), texts=("",))


def deep(chance: random.Random) -> Fault:
    depth = chance.choice([500, 3000, 100_000])
    nest = b"[" * depth + b"]" * chance.choice([0, depth])
    good = dumps(whole(HALF))
    data = chance.choice(
        [
            nest, b'{"a":' * depth, good[:-1] + b', "more": ' + nest + b"}",
            good.replace(b'"index": 0', b'"logprobs": {"content": ' + nest + b"}"),
            good.replace(json.dumps(HALF).encode(), nest), b'{"error": ' + nest + b"}",
        ]
    )  # fmt: skip
    status = chance.choice([200, 200, 400, 500])
    # Depth around an answer is not limited.
    texts = (HALF, "") if status == 200 else ()
    return Fault(
        f"{depth} deep, {status}", lambda text: body(data, status), texts, billed=status == 200
    )


def huge(chance: random.Random) -> Fault:
    name = chance.choice(["body", "spaces", "gzip", "deflate", "header", "headers", "error"])
    blank = b" " * (33 << 20)
    if name == "body":
        return Fault("33 MiB", lambda text: body(dumps(whole(HALF * (2 << 20)))))
    if name == "spaces":
        return Fault("33 MiB of spaces", lambda text: body(blank + dumps(whole(HALF))))
    if name == "gzip":
        bomb = gzip.compress(blank + dumps(whole(HALF)))
        return Fault("a gzip bomb", lambda text: body(bomb, content_encoding="gzip"))
    if name == "deflate":
        flat = zlib.compress(blank + dumps(whole(HALF)))
        return Fault("a deflate bomb", lambda text: body(flat, content_encoding="deflate"))
    if name == "header":
        return Fault("a long header", lambda text: body(dumps(whole(text)), x_long="a" * 200_000))
    if name == "headers":
        many: dict[str, Any] = {f"x_{n}": "a" * 50 for n in range(5000)}
        return Fault("5,000 headers", lambda text: body(dumps(whole(text)), **many))
    return Fault("33 MiB of an error", lambda text: body(blank, chance.choice([400, 500, 429])))


def compressed(chance: random.Random) -> Fault:
    good = dumps(whole(HALF))
    if chance.random() < 0.3:
        return Fault(
            "sound gzip",
            lambda text: body(gzip.compress(dumps(whole(text))), content_encoding="gzip"),
        )
    encoding, data = chance.choice(
        [
            ("gzip", good), ("gzip", gzip.compress(good)[:-9]), ("deflate", b"\0" * 40),
            ("gzip", gzip.compress(good)[:20] + b"xxxx" + gzip.compress(good)[24:]),
            ("br", good), ("zstd", b"\x28\xb5\x2f\xfd\0\0\0"), ("gzip, gzip", gzip.compress(good)),
            ("nonsense", gzip.compress(good)), ("compress", b"\x1f\x9d\0"),
        ]
    )  # fmt: skip
    return Fault(f"bad {encoding}", lambda text: body(data, content_encoding=encoding), (HALF,))


def half(chance: random.Random) -> Fault:
    how: Any = chance.choice(["cut", "hang", "trickle"])
    return Fault(how, lambda text: Reply(text=HALF, how=how))


def finish(chance: random.Random) -> Fault:
    reason = chance.choice(
        ["error", "error", "abort", "tool_calls", "function_call", "ERROR", "cancelled", "timeout",
         "x" * 9999, "network_error", "\x1b[31mred", f"stop {KEY}", "stop\n", "stopped?",
         "null", "recitation"]
    )  # fmt: skip
    return Fault(
        f"finish {reason[:20]!r}", lambda text: body(dumps(whole(HALF, finish_reason=reason)))
    )


def logprobs(chance: random.Random) -> Fault:
    token: dict[str, Any] = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    bad: Any = chance.choice(
        [
            [None], ["a"], [7], [[]], [{}], [{**token, "logprob": None}], [{**token, "token": 7}],
            [{**token, "logprob": "-1"}], [{**token, "logprob": 5.0}], [{**token, "bytes": [999]}],
            [{**token, "bytes": "a"}], [{**token, "bytes": [1.5]}], [{**token, "bytes": [None]}],
            [{**token, "top_logprobs": [7]}], [{**token, "top_logprobs": "all"}],
            [{**token, "top_logprobs": [{"token": "b"}]}], [{**token, "logprob": float("nan")}],
            [{**token, "logprob": -(10**400)}], [token, None], [{**token, "logprob": True}],
            [{**token, "top_logprobs": {"a": -1}}], [{**token, "logprob": float("inf")}],
        ]
    )  # fmt: skip
    value = whole(HALF, logprobs={"content": bad})
    return Fault(f"log-probabilities {str(bad)[:60]}", lambda text: body(dumps(value)))


def usage(chance: random.Random) -> Fault:
    odd: Any = chance.choice(
        [
            None, 7, [], "many", {}, {"prompt_tokens": "10", "completion_tokens": 5},
            {"prompt_tokens": -10, "completion_tokens": -5}, {"prompt_tokens": 10},
            {"prompt_tokens": 10.5, "completion_tokens": 5}, {"prompt_tokens": None},
            {"prompt_tokens": 10**30, "completion_tokens": 10**30}, {"completion_tokens": True},
            {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
        ]
    )  # fmt: skip
    return Fault(f"usage {odd!r}"[:60], lambda text: body(dumps({**whole(text), "usage": odd})))


def content_type(chance: random.Random) -> Fault:
    kind = chance.choice(
        ["text/html", "text/event-stream", "", "nonsense", "application/json; charset=utf-7",
         "application/json; charset=nothing", "multipart/form-data", "application/octet-stream"]
    )  # fmt: skip
    return Fault(f"type {kind}", lambda text: body(dumps(whole(text)), content_type=kind))


# --- statuses ----------------------------------------------------------------------------------


def status(chance: random.Random) -> Fault:
    number = chance.choice([400, 401, 402, 403, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503,
                            529, 201, 202, 203, 204, 206, 304, 300, 600, 999])  # fmt: skip
    data = chance.choice([b"", dumps(whole(HALF)), b"no", dumps({"error": {"message": "no"}})])
    return Fault(f"status {number}", lambda text: body(data, number), billed=False)


def retry_after(chance: random.Random) -> Fault:
    value = chance.choice(
        ["3600", "-5", "nan", "inf", "-inf", "1e400", "soon", "", "0",
         "Wed, 99 Oct 2015 07:28:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT",
         "Fri, 31 Dec 9999 23:59:59 -2359", "0.01", "9" * 400,
         "Mon, 01 Jan 0001 00:00:00 +2359", "1,2", "\u0660"]
    ).encode().decode("latin-1")  # fmt: skip
    name = chance.choice(["retry_after", "retry_after_ms"])
    number = chance.choice([429, 503])
    return Fault(
        f"{number}, {name}: {value[:20]}",
        lambda text: body(b"{}", number, **{name: value}),
        (),
        False,
    )


def within(chance: random.Random) -> Fault:
    """An error in a reply with status 200."""
    code: Any = chance.choice([429, "502", "rate_limit_exceeded", "server_error", 200, 0, None, "x",
                               [429], {"a": 1}, 1e300, True, "insufficient_quota"])  # fmt: skip
    value = {"error": {"message": "no", "code": code}}
    return Fault(f"error {code!r} within 200", lambda text: body(dumps(value)), (), False)


def echoed(chance: random.Random) -> Fault:
    """The key in one of many encodings, in any place where a server can repeat it."""
    spelled = spelling(chance, KEY[: chance.choice([12, 13, len(KEY) - 1, len(KEY), len(KEY)])])
    place = chance.choice(["error", "plain", "text", "reasoning", "finish", "invalid", "location"])
    if place == "location":
        target = "http://127.0.0.1:1/?key=" + spelled.replace("\n", "")
        return Fault(
            f"redirect with {spelled}", lambda text: body(b"", 302, location=target), (), False
        )
    if place in ("error", "plain"):
        number = chance.choice([400, 401, 403, 404, 429, 500])
        cut = "x" * chance.randrange(290) + spelled
        data = (
            cut.encode() if place == "plain" else b'{"error": {"message": "' + cut.encode() + b'"}}'
        )
        return Fault(f"{number} with {spelled}", lambda text: body(data, number), (), False)
    if place == "invalid":
        return Fault(f"no JSON with {spelled}", lambda text: body(f"key {spelled}".encode()))
    message = {"role": "assistant", "content": f"say {spelled} again"}
    if place == "reasoning":
        message = {"role": "assistant", "content": HALF, "reasoning": f"so {spelled}"}
    reason = f"error {spelled}" if place == "finish" else "stop"
    value = whole("", message=message, finish_reason=reason)
    return Fault(f"{place} with {spelled}", lambda text: body(dumps(value)), texts=("*",))


def spelling(chance: random.Random, key: str) -> str:
    ways: Sequence[Callable[[str], str]] = (
        str,
        lambda c: c.replace("/", "\\/"),
        lambda c: f"\\u{ord(c):04x}",
        lambda c: f"\\u{ord(c):04X}",
        lambda c: f"\\\\u{ord(c):04x}",
        lambda c: quote(c, safe=""),
        lambda c: f"%{ord(c):02x}",
        lambda c: f"&#{ord(c)};",
        lambda c: f"&#x{ord(c):x};",
        lambda c: f"&#X{ord(c):X};",
        lambda c: f"&#0{ord(c)};",
        lambda c: f"\\x{ord(c):02x}",
        lambda c: f"%25{ord(c):02x}",
    )
    way = chance.choice([*ways, None])
    return "".join((way or chance.choice(ways))(character) for character in key)


# --- invalid HTTP ------------------------------------------------------------------------------


def raw(chance: random.Random) -> Fault:
    good = dumps(whole(HALF))
    head = b"HTTP/1.1 200 OK\r\n"
    odd = b"HTTP/9.9 200 OK\r\n\r\n" + good
    data = chance.choice(
        [
            b"", b"\0", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1\r\n\r\n",
            odd, head + b"content-length: -5\r\n\r\n" + good,
            head + b"content-length: x\r\n\r\n" + good,
            head + b"content-length: 9\r\ncontent-length: 10\r\n\r\n" + good,
            head + b"content-length: %d\r\n\r\n" % (len(good) + 7) + good,
            head + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + good,
            head + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(good) + good,
            head + b"transfer-encoding: chunked\r\n\r\n-1\r\n" + good + b"\r\n0\r\n\r\n",
            head + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n" + good,
            head + b"no colon here\r\n\r\n" + good, head + b"x: \0\r\ncontent-length: 2\r\n\r\n{}",
            b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 -1 OK\r\n\r\n",
            b"HTTP/1.1 101 Go\r\n\r\n" + good,
            b"HTTP/1.1 100 Continue\r\n\r\n", b"\r\n" * 5000, b"HTTP/1.1 200 " + b"x" * 100_000,
        ]
    )  # fmt: skip
    # A different HTTP version, but a complete reply.
    return Fault(f"raw {data[:40]!r}", lambda text: Reply(raw=data), (HALF,) if data == odd else ())


def sound(chance: random.Random) -> Fault:
    """An unusual but valid reply, which must become an answer."""
    parts = chance.choice([
        lambda text: whole(text, message={"content": [{"type": "text", "text": text}]}),
        lambda text: {**whole(text), "model": "another", "extra": [1, {"a": None}]},
        lambda text: whole(text, finish_reason="eos"),
        lambda text: whole(text, logprobs=None),
    ])  # fmt: skip
    return Fault("odd but sound", lambda text: body(dumps(parts(text))))


FAULTS: tuple[Callable[[random.Random], Fault], ...] = (
    malformed, empty, deep, huge, compressed, half, finish, logprobs, usage, content_type, status,
    retry_after, within, echoed, echoed, raw, sound,
)  # fmt: skip
