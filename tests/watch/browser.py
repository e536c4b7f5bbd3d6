"""A headless Chromium, driven through its DevTools protocol with no package other than aiohttp."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--window-size=1400,1000",
)
_UPDATE = 'document.dispatchEvent(new Event("visibilitychange"))'
"""Makes the live page update immediately instead of after five seconds."""


class PageError(Exception):
    """The browser rejected a command."""


class Page:
    """The browser's page. problems: errors in its console, including what its policy blocked."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket, self._numbers = socket, itertools.count(1)
        self.problems: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json()
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(message["params"]))
            if message.get("method") == "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error":
                    self.problems.append(entry["text"])
            if message.get("id") == number:
                if "error" in message:
                    raise PageError(str(message["error"]))
                result: dict[str, Any] = message["result"]
                return result

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)
        await self.wait('document.readyState === "complete" && location.protocol === "http:"')

    async def value(self, script: str) -> Any:
        found = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; the test limits the time."""
        while True:
            with suppress(PageError):  # another page is being loaded
                if await self.value(f"{_UPDATE}; Boolean({condition})"):
                    return
            await asyncio.sleep(0.1)

    async def press(self, key: str, **more: Any) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, **more)

    async def write(self, text: str) -> None:
        """Type text into the focused element."""
        await self.call("Input.insertText", text=text)

    async def dark(self, value: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if value else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def screenshot(self, path: Path) -> None:
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """Yield an empty page. profile: a folder for the browser's files."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank", stdout=-3, stderr=-3
    )
    try:
        port_file = profile / "DevToolsActivePort"
        while not port_file.exists() or not port_file.read_text().strip():
            assert process.returncode is None
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        async with ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                pages = [one for one in await reply.json() if one["type"] == "page"]
            address = pages[0]["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        process.kill()
        await process.wait()
