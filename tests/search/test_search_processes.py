"""Several processes that share candidates find the same shape and numbers as one."""

from __future__ import annotations

import pickle
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from stillhouse.search.search_shape import JOURNAL, WORK, Found, search_shape
from stillhouse.shared_work import all_processes
from tests import forks
from tests.search.test_search import setting

pytestmark = pytest.mark.run


def search(folder: Path, out: str) -> None:
    processes = all_processes()
    chosen = replace(setting(folder, out), processes=processes)
    chosen.out.mkdir(exist_ok=True)
    found = search_shape(chosen)
    (folder / f"{out}.{processes.own}").write_bytes(pickle.dumps(found))


def found_by(folder: Path, out: str, process: int = 0) -> Found:
    found: Found = pickle.loads((folder / f"{out}.{process}").read_bytes())
    return found


def in_processes(count: int, folder: Path, out: str) -> None:
    for rank in forks.ranks(count, partial(search, folder, out)):
        assert rank.wait(timeout=250) == 0, rank.communicate()[1][-3000:]


def test_two_processes_find_what_one_finds_even_after_a_kill(tmp_path: Path) -> None:
    setting(tmp_path)  # saves the teacher
    in_processes(1, tmp_path, "one")
    one = found_by(tmp_path, "one")
    in_processes(2, tmp_path, "two")
    assert [found_by(tmp_path, "two", process) for process in (0, 1)] == [one, one]
    written = [tmp_path / out / "candidates.json" for out in ("one", "two")]
    assert written[0].read_bytes() == written[1].read_bytes()
    killed = forks.ranks(2, partial(search, tmp_path, "killed"))
    own_file = tmp_path / "killed" / WORK / f"{JOURNAL}.1"
    while not own_file.is_file() or b"one-shot" not in own_file.read_bytes():
        assert killed[1].poll() is None, killed[1].errors()
        time.sleep(0.01)
    killed[1].send_signal(signal.SIGKILL)
    assert all(process.wait(timeout=60) for process in killed)
    before = own_file.read_bytes()
    in_processes(1, tmp_path, "killed")
    assert found_by(tmp_path, "killed") == one
    assert own_file.read_bytes() == before  # its results were not computed again
