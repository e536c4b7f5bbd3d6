"""`stillhouse watch` as a user sees it: in a separate process, through a headless browser."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.config.load_recipe import parse_recipe
from stillhouse.pipeline.run_progress import ProgressFile
from stillhouse.progress import Work
from stillhouse.section import recipe_yaml
from tests import tiny
from tests.watch import run_folders
from tests.watch.browser import CHROMIUM, browser

pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
LIMIT = 240.0
SHOTS = Path(os.environ["STILLHOUSE_SHOTS"]) if "STILLHOUSE_SHOTS" in os.environ else None
"""A folder in which to save screenshots for inspection; None: none are taken."""


class Watch:
    """A running `stillhouse watch`, and its address."""

    def __init__(self, runs: Path) -> None:
        command = [sys.executable, "-m", "stillhouse", "watch", str(runs), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
        assert self.process.stdout is not None
        found = re.fullmatch(r"watch +(http://localhost:\d+/)\n", self.process.stdout.readline())
        assert found is not None
        self.address = found[1]

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate()
        return self.process.returncode, errors


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def watch(runs: Path) -> Iterator[Watch]:
    started = Watch(runs)
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_without_a_message(watch: Watch, number: int, status: int) -> None:
    assert watch.end(number) == (status, "")


def test_a_port_in_use_is_a_clear_error(watch: Watch) -> None:
    port = watch.address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "stillhouse", "watch", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: port {port} on this machine cannot be used")


@needs_browser
def test_the_page_shows_a_run_as_it_progresses_and_chats_with_its_models(
    watch: Watch, runs: Path, tmp_path: Path
) -> None:
    """The run begins after the page is open; at the end, the teacher and the student answer."""
    root = runs / "demo"

    async def work() -> None:
        async with asyncio.timeout(LIMIT), browser(tmp_path / "profile") as page:
            await page.open(watch.address)
            assert "There are no runs here yet" in await page.value("document.body.innerText")

            raw = tiny.recipe(tmp_path)
            run_folders.begun(root)
            (root / "recipe.yaml").write_text(recipe_yaml(parse_recipe(raw)))
            file = ProgressFile(root, tmp_path)
            file.expect(root, ["data", "student", "train", "evaluate", "report"])
            run_folders.record(file, "data", 2.0)
            run_folders.record(file, "student", 31.0)
            train = file.begin(root, "train", "train-key")
            run_folders.log_steps(run_folders.partial(root, "train"), 1, 3)
            file.now.work = Work("train", 300, 1000, "tokens", 10.0)
            file.write()
            await page.wait('document.querySelector(".runs a") !== null')
            if SHOTS is not None:
                await page.screenshot(SHOTS / "index.png")
            await page.value('document.querySelector(".runs a").click()')
            await page.wait('location.pathname === "/runs/demo/"')
            await page.wait('document.querySelector("#training-0 svg") !== null')
            curve = "document.querySelector('#training-0 svg').getAttribute('aria-label')"
            assert "30%" in await page.value("document.querySelector('#live').innerText")
            before = await page.value(curve)
            if SHOTS is not None:
                await page.screenshot(SHOTS / "training.png")

            run_folders.log_steps(run_folders.partial(root, "train"), 4, 12)
            await page.wait(f"{curve} !== {before!r}")
            tiny.save_model(run_folders.partial(root, "train") / "model", seed=1)
            run_folders.finish(root, "train")
            train.state, train.seconds = "done", 75.0
            run_folders.write_evaluation(run_folders.partial(root, "evaluate"))
            run_folders.finish(root, "evaluate")
            run_folders.record(file, "evaluate", 4.0)
            (root / "report.html").write_text("<h1>The report</h1>")
            file.close("finished")
            await page.wait('document.querySelector("#evaluation table") !== null')
            link = "document.querySelector('#live a[href=\"report.html\"]')"
            assert await page.value(f"{link} !== null")

            # Chat with the keyboard alone: type a prompt and press Ctrl+Enter.
            await page.value('document.getElementById("max-tokens").value = 12')
            await page.value('document.getElementById("prompt").focus()')
            await page.write("the cat sees <b>a tree</b>")
            await page.press("Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=2)
            answered = '[...document.querySelectorAll("#turns small")].every((n) => n.textContent)'
            await page.wait(f'document.querySelector("#turns small") !== null && {answered}')
            notes = await page.value(
                '[...document.querySelectorAll("#turns small")].map((n) => n.textContent)'
            )
            assert all("tokens" in note for note in notes), notes
            assert len(notes) == 2
            shown = await page.value('document.querySelector("#turns .prompt").textContent')
            assert shown == "the cat sees <b>a tree</b>"
            answers = '[...document.querySelectorAll("#turns [data-role]")]'
            texts = await page.value(f"{answers}.map((one) => one.textContent)")
            assert len(texts) == 2
            assert texts[0] != texts[1]
            await page.wait('document.getElementById("chat-state").textContent === ""')
            if SHOTS is not None:
                await page.screenshot(SHOTS / "chat.png")
                await page.dark(True)
                await page.screenshot(SHOTS / "chat_dark.png")
            await page.value(f"{link}.click()")
            await page.wait('document.querySelector("h1").textContent === "The report"')
            assert page.problems == []

    asyncio.run(work())
    assert watch.end(signal.SIGINT) == (130, "")
