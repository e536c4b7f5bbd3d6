"""Every endpoint of the server over loopback, with a chat that answers without models."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application, Request

from stillhouse.pipeline.run_progress import ProgressFile
from stillhouse.watch.chat_link import ChatBusyError, ChatProcess
from stillhouse.watch.watch_server import TURNS, WatchServer
from tests.watch import run_folders


class EchoChat(ChatProcess):
    """Answers with the prompt. asked: the requests."""

    def __init__(self, *, busy: bool = False) -> None:
        super().__init__()
        self.busy = busy
        self.asked: list[Mapping[str, Any]] = []

    async def answers(self, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        if self.busy:
            raise ChatBusyError("another prompt is being answered", fix="wait for its end")
        self.asked.append(request)
        for role in ("student", "teacher"):
            yield {"role": role, "text": request["prompt"]}


Client = TestClient[Request, Application]
Visit = Callable[[Client, WatchServer], Awaitable[None]]


def visit(runs: Path, visitor: Visit, chat: ChatProcess | None = None) -> None:
    async def work() -> None:
        server = WatchServer(runs, chat or EchoChat())
        async with TestClient(TestServer(server.application())) as client:
            await visitor(client, server)

    asyncio.run(work())


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with the finished run `demo`, next to a file that must not be served."""
    root = tmp_path / "runs" / "demo"
    run_folders.begun(root)
    file = ProgressFile(root, root)
    run_folders.record(file, "train", 2.0)
    run_folders.log_steps(run_folders.partial(root, "train"), 1, 4)
    run_folders.finish(root, "train")
    file.close("finished")
    (root / "report.html").write_text("<script>alert(1)</script>")
    (tmp_path / "secret.html").write_text("secret")
    return tmp_path / "runs"


def asks(server: WatchServer, **changes: Any) -> dict[str, Any]:
    """Arguments of a chat request."""
    return {"json": {"prompt": "hello", **changes}, "headers": {"X-Stillhouse-Token": server.token}}


def test_pages_load_nothing_from_elsewhere_and_run_only_the_servers_script(runs: Path) -> None:
    async def visitor(client: Client, server: WatchServer) -> None:
        for path in ("/", "/runs/demo/"):
            reply = await client.get(path)
            text = await reply.text()
            assert reply.status == 200
            assert "script-src 'self'" in reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert "http://" not in text.replace("http://www.w3.org", "")
            assert "https://" not in text
            assert text.count("<script") == 1
            assert " onclick" not in text
        for path, kind in (("/watch.css", "text/css"), ("/watch.js", "text/javascript")):
            reply = await client.get(path)
            assert reply.content_type == kind
            assert "http" not in (await reply.text()).replace("https://www.w3.org", "")

    visit(runs, visitor)


def test_a_training_has_curves_of_the_students_own_text(runs: Path) -> None:
    (folder,) = (runs / "demo" / "stages").glob("train-*")
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (2, 4):
            file.write(json.dumps({"step": step, "own_repetition": step / 10}) + "\n")

    async def visitor(client: Client, _server: WatchServer) -> None:
        text = await (await client.get("/runs/demo/")).text()
        assert "KL to the teacher" in text
        assert "Repetition and truncated answers" in text

    visit(runs, visitor)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_requests_for_another_host_name_are_rejected(runs: Path, host: str) -> None:
    async def visitor(client: Client, _server: WatchServer) -> None:
        for path in ("/", "/live", "/runs/demo/", "/watch.js", "/runs/demo/report.html"):
            reply = await client.get(path, headers={"Host": host})
            assert reply.status == 403
            assert "ssh -L" in await reply.text()

    visit(runs, visitor)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9000", "127.0.0.1:1", "[::1]:80", "[::1]"]
)
def test_every_loopback_name_is_accepted(runs: Path, host: str) -> None:
    async def visitor(client: Client, _server: WatchServer) -> None:
        assert (await client.get("/", headers={"Host": host})).status == 200

    visit(runs, visitor)


@pytest.mark.parametrize(
    "path",
    [
        "/runs/../secret.html",
        "/runs/demo/../../secret.html",
        "/runs/demo/..%2f..%2fsecret.html",
        "/runs/..%2f/secret.html",
        "/runs/demo/recipe.yaml",
        "/runs/demo/.progress.json",
        "/runs/demo/stages/report.html",
        "/runs/nothing/",
        "/runs/nothing/live",
        "/runs//",
    ],
)
def test_no_file_other_than_the_report_is_served(runs: Path, path: str) -> None:
    async def visitor(_client: Client, server: WatchServer) -> None:
        async with TestServer(server.application()) as test_server, ClientSession() as session:
            url = test_server.make_url("/").with_path(path, encoded=True)
            async with session.get(url) as reply:
                assert reply.status == 404
                assert "secret" not in await reply.text()

    visit(runs, visitor)


def test_a_report_is_served_without_scripts(runs: Path) -> None:
    async def visitor(client: Client, _server: WatchServer) -> None:
        reply = await client.get("/runs/demo/report.html")
        policy = reply.headers["Content-Security-Policy"]
        assert reply.status == 200
        assert "script-src" not in policy
        assert policy.startswith("default-src 'none'")
        assert policy.endswith("sandbox")

    visit(runs, visitor)


def test_a_report_that_is_a_link_to_outside_its_run_is_not_served(runs: Path) -> None:
    report = runs / "demo" / "report.html"
    report.unlink()
    report.symlink_to("../../secret.html")

    async def visitor(client: Client, _server: WatchServer) -> None:
        reply = await client.get("/runs/demo/report.html")
        assert reply.status == 404

    visit(runs, visitor)


def test_unchanged_content_is_not_sent_again(runs: Path) -> None:
    async def visitor(client: Client, _server: WatchServer) -> None:
        for path in ("/live", "/runs/demo/live"):
            first = await client.get(path)
            tag = {"If-None-Match": first.headers["ETag"]}
            assert (await client.get(path, headers=tag)).status == 304
        run_folders.log_steps(runs / "demo" / "stages" / "train-key", 5, 9)
        assert (await client.get("/runs/demo/live", headers=tag)).status == 200

    visit(runs, visitor)


def test_a_chat_streams_lines_of_json(runs: Path) -> None:
    chat = EchoChat()

    async def visitor(client: Client, server: WatchServer) -> None:
        reply = await client.post("/runs/demo/chat", **asks(server, max_tokens=7))
        lines = (await reply.text()).splitlines()
        assert [json.loads(line) for line in lines] == [
            {"role": "student", "text": "hello"},
            {"role": "teacher", "text": "hello"},
        ]

    visit(runs, visitor, chat)
    (asked,) = chat.asked
    assert asked["max_tokens"] == 7
    assert asked["root"] == str(runs / "demo")
    assert asked["folders"] == {"train": str(runs / "demo" / "stages" / "train-key")}


@pytest.mark.parametrize("token", ["", "wrong", "ü"])
def test_a_chat_needs_the_pages_token(runs: Path, token: str) -> None:
    chat = EchoChat()

    async def visitor(client: Client, _server: WatchServer) -> None:
        for headers in ({"X-Stillhouse-Token": token}, {}):
            reply = await client.post("/runs/demo/chat", json={"prompt": "x"}, headers=headers)
            assert reply.status == 403

    visit(runs, visitor, chat)
    assert chat.asked == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 20_001}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2000}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"root": "/etc"}, "root"),
        ({"turns": [{"prompt": "a", "answers": {}}] * (TURNS + 1)}, "turns"),
        ({"member": "small"}, "no member 'small'"),
    ],
)
def test_an_invalid_chat_request_is_rejected(
    runs: Path, changes: dict[str, Any], named: str
) -> None:
    chat = EchoChat()

    async def visitor(client: Client, server: WatchServer) -> None:
        reply = await client.post("/runs/demo/chat", **asks(server, **changes))
        assert reply.status == 400
        assert named in await reply.text()

    visit(runs, visitor, chat)
    assert chat.asked == []


def test_a_second_prompt_is_refused_while_one_is_answered(runs: Path) -> None:
    async def visitor(client: Client, server: WatchServer) -> None:
        reply = await client.post("/runs/demo/chat", **asks(server))
        assert reply.status == 409
        assert "another prompt is being answered" in await reply.text()

    visit(runs, visitor, EchoChat(busy=True))


def test_a_run_can_be_deleted_while_it_is_watched(runs: Path) -> None:
    async def visitor(client: Client, _server: WatchServer) -> None:
        (runs / "demo").rename(runs.parent / "moved")
        assert (await client.get("/runs/demo/live")).status == 404
        assert "There are no runs here yet" in await (await client.get("/live")).text()

    visit(runs, visitor)


@pytest.mark.run
def test_the_server_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, stillhouse.watch.watch_server; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
