"""The server of `stillhouse watch`, on loopback only, and read-only except for the chat.

Other sites' pages must not reach it. Against DNS rebinding, the Host header must name this
machine's loopback; chat requests need a token that only the server's own page has; and the content
security policy allows only the server's own script.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field, ValidationError

from stillhouse.errors import RunError, StillhouseError
from stillhouse.event_loop import run_stoppable
from stillhouse.report.page import FAMILY_REPORT, REPORT
from stillhouse.section import Section
from stillhouse.watch.chat_link import ChatBusyError, ChatProcess, chat_threads
from stillhouse.watch.live_page import index_page, index_part, run_page, run_part
from stillhouse.watch.watched_runs import WatchedRun, find_runs, read_run

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROMPT_CHARACTERS, TURNS, MAX_TOKENS = 20_000, 20, 1024
_BODY_BYTES = 1 << 20
_FIXED = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Turn(Section):
    """One turn of a conversation. answers: by role; a turn that a role did not answer is left out
    of that role's conversation."""

    prompt: Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
    answers: dict[str, Annotated[str, Field(max_length=8 * PROMPT_CHARACTERS)]]


class ChatRequest(Section):
    """A chat request. member: a family's member. turns: the conversation's earlier turns."""

    prompt: Annotated[str, Field(min_length=1, max_length=PROMPT_CHARACTERS)]
    turns: list[Turn] = Field([], max_length=TURNS)
    member: str = ""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 200
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0


class WatchServer:
    """Serves the runs in a folder. token: required in every chat request."""

    def __init__(self, folder: Path, chat: ChatProcess) -> None:
        self.folder, self.chat = folder, chat
        self.token = secrets.token_urlsafe(24)
        self._drawing = asyncio.Lock()

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_guarded], client_max_size=_BODY_BYTES)
        app.on_response_prepare.append(_add_headers)
        app.add_routes(
            [
                web.get("/", self.index),
                web.get("/live", self.index_live),
                web.get("/watch.css", self.style),
                web.get("/watch.js", self.script),
                web.get("/runs/{run}/", self.run),
                web.get("/runs/{run}/live", self.run_live),
                web.get("/runs/{run}/{page}", self.report),
                web.get("/runs/{run}/{member}/{page}", self.report),
                web.post("/runs/{run}/chat", self.answer),
            ]
        )
        return app

    # --- pages -----------------------------------------------------------------------------------

    async def index(self, _request: web.Request) -> web.Response:
        return _html(await self._drawn(lambda: index_page(self.folder)))

    async def index_live(self, request: web.Request) -> web.Response:
        return _if_changed(request, await self._drawn(lambda: index_part(self.folder)))

    async def run(self, request: web.Request) -> web.Response:
        run = self._found(request)
        return _html(await self._drawn(lambda: run_page(run, self.token, chat_threads())))

    async def run_live(self, request: web.Request) -> web.Response:
        run = self._found(request)
        return _if_changed(request, await self._drawn(lambda: run_part(run)))

    async def style(self, _request: web.Request) -> web.Response:
        """Serve the report's style sheet with the live page's additions."""
        report = Path(__file__).parents[1] / "report" / "report.css"
        text = report.read_text(encoding="utf-8") + _own_file("watch.css")
        return web.Response(text=text, content_type="text/css")

    async def script(self, _request: web.Request) -> web.Response:
        return web.Response(text=_own_file("watch.js"), content_type="text/javascript")

    async def report(self, request: web.Request) -> web.Response:
        """Serve a finished report as it is on disk, with a policy that blocks any scripts in it."""
        run = self._found(request)
        pages = {run.report, *(part.report for part in run.parts)}
        name = "/".join(
            request.match_info[key] for key in ("member", "page") if key in request.match_info
        )
        path = (run.root / name).resolve() if name in pages and name else None
        if path is None or not path.is_relative_to(run.root.resolve()):
            raise web.HTTPNotFound(text=f"{run.name} has no such page; a report is {REPORT} or "
                                        f"{FAMILY_REPORT}")  # fmt: skip
        try:
            text = await asyncio.to_thread(path.read_text, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise web.HTTPNotFound(text=f"the report cannot be read: {error}") from error
        return _html(text, _REPORT_POLICY)

    def _found(self, request: web.Request) -> WatchedRun:
        """Find the run that the address names, only among the runs in the folder."""
        name = request.match_info["run"]
        root = find_runs(self.folder).get(name)
        if root is None:
            raise web.HTTPNotFound(text="this folder does not contain that run")
        return read_run(name, root)

    async def _drawn(self, page: Callable[[], str]) -> str:
        """Render pages in a thread, one at a time, because matplotlib's settings are global."""
        async with self._drawing:
            return await asyncio.to_thread(page)

    # --- chat ------------------------------------------------------------------------------------

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Stream the teacher's and the student's answers as JSON lines while they are generated."""
        run = self._found(request)
        given = request.headers.get("X-Stillhouse-Token", "")
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            raise web.HTTPForbidden(text="the server has restarted since: reload this page")
        try:
            asked = ChatRequest.model_validate_json(await request.text())
        except (ValidationError, UnicodeError) as error:
            raise web.HTTPBadRequest(text=_what_is_wrong(error)) from error
        part = run.part(asked.member)
        if part is None:
            what = f"{run.name} has no member {asked.member!r}: reload the page"
            raise web.HTTPBadRequest(text=what)
        message = {
            "root": str(run.root.resolve()),
            "base": None if run.base is None else str(run.base),
            "folders": {name: str(path) for name, path in part.folders.items()},
            **asked.model_dump(),
        }
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        async with aclosing(self.chat.answers(message)) as events:
            try:
                async for event in events:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write((json.dumps(event) + "\n").encode())
            except ChatBusyError as error:
                raise web.HTTPConflict(text=f"{error.what}: {error.fix}") from error
        return response


def _what_is_wrong(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "the request is not UTF-8"
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the request'}: {first['msg']}"


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Reject requests with any other host name, and return errors as plain text."""
    if _host(request.headers.get("Host", "")) not in LOOPBACK:
        raise web.HTTPForbidden(
            text="this server only answers as localhost; from another machine, forward its port: "
            "ssh -L 8000:localhost:8000 HOST"
        )
    try:
        return await handler(request)
    except StillhouseError as error:
        return web.Response(status=500, text=str(error))


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_FIXED)


def _host(header: str) -> str:
    """The host name in a Host header, without the port."""
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
    return name.strip("[]").lower()


def _html(text: str, policy: str = _PAGE_POLICY) -> web.Response:
    headers = {"Content-Security-Policy": policy}
    return web.Response(text=text, content_type="text/html", headers=headers)


def _if_changed(request: web.Request, text: str) -> web.Response:
    """Respond with the text unless the browser already has it."""
    tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:20]}"'
    if request.headers.get("If-None-Match") == tag:
        return web.Response(status=304, headers={"ETag": tag})
    response = _html(text)
    response.headers["ETag"] = tag
    return response


@cache
def _own_file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


# --- start and end -------------------------------------------------------------------------------


def serve(folder: Path, port: int, device: str, announce: Callable[[str], Any]) -> None:
    """Serve until a signal arrives. announce: called with the address once it can be opened.

    Raises RunError if the port is in use.
    """
    os.nice(19)
    listening = _listening(port)
    with listening:
        run_stoppable(_serve(folder, listening, device, announce))


async def _serve(
    folder: Path, listening: socket.socket, device: str, announce: Callable[[str], Any]
) -> None:
    chat = ChatProcess(device)
    app = WatchServer(folder, chat).application()
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        announce(f"http://localhost:{listening.getsockname()[1]}/")
        await asyncio.Event().wait()
    finally:
        await chat.close()
        await runner.cleanup()


def _listening(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise RunError(
            f"port {port} on this machine cannot be used: {error.strerror}",
            where="--port",
            fix="choose a different port, or pass --port 0 to let the system choose",
        ) from error
    return listening
