"""A local teacher's answers from several processes, each with a model of its own."""

from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.commands import synthesize_text
from tests import forks

from .test_synthesize import write

pytestmark = pytest.mark.run

SECTION: dict[str, Any] = {
    "teacher": {"local": {"batch": 2, "precision": "float32"}},
    "prompts": {"path": "prompts.txt", "samples": 3},
    "sampling": {"max_tokens": 8, "temperature": 1.0},
    "filters": {"truncated": False, "exact_duplicates": False},
}


def recipe_in(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    recipe = write(folder, "http://unused/v1")
    raw = {**yaml.safe_load(recipe.read_text()), "synthesize": {**SECTION, **changes}}
    recipe.write_text(yaml.safe_dump(raw))
    return recipe


def synthesized(recipe: Path) -> None:
    result = synthesize_text(recipe)
    if result is not None:
        (recipe.parent / "facts").write_text(f"{result.new} {result.answered} {result.requests}")


def in_processes(count: int, recipe: Path) -> list[str]:
    """What each process says."""
    ranks = forks.ranks(count, partial(synthesized, recipe))
    try:
        for rank in ranks:
            assert rank.wait(timeout=250) == 0, rank.communicate()[1][-3000:]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
    return [rank.communicate()[1] for rank in ranks]


def answers_in(journal: Path) -> int:
    """In a journal that another process may be writing, or has not made yet."""
    try:
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def test_processes_write_what_one_does(tmp_path: Path) -> None:
    one = synthesize_text(recipe_in(tmp_path / "one"))
    assert one is not None
    many = recipe_in(tmp_path / "many")
    said = in_processes(3, many)
    assert all("answers in float32" in each for each in said)
    assert (many.parent / "facts").read_text() == "36 36 36"
    assert (many.parent / one.out.name).read_bytes() == one.out.read_bytes()
    in_processes(2, many)
    assert (many.parent / "facts").read_text() == "0 36 36"


def test_a_judge_is_helped_too(tmp_path: Path) -> None:
    """Its model is loaded by each process after the teacher's has answered."""
    judge = {"kind": "judge", "teacher": {"local": {"precision": "float32"}}}
    recipe = recipe_in(tmp_path / "judged", filters={**SECTION["filters"], "best_of": judge})
    with pytest.raises(AssertionError, match="no row is left"):
        in_processes(2, recipe)  # a random model gives no verdict
    assert answers_in(recipe.parent / "runs" / "answers.sqlite") > 36


def test_answers_before_a_kill_are_kept(tmp_path: Path) -> None:
    changes = {"sampling": {"max_tokens": 100, "temperature": 1.0}}
    recipe = recipe_in(tmp_path / "killed", **changes)
    ranks = forks.ranks(2, partial(synthesized, recipe))
    while answers_in(recipe.parent / "runs" / "answers.sqlite") < 4:
        assert ranks[1].poll() is None, ranks[1].errors()
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGKILL)
    assert ranks[0].wait(timeout=60) != 0
    assert "process 1 of 2 has ended\n  where: it was killed" in ranks[0].errors()
    synthesized(recipe)
    new, answered, requests = map(int, (recipe.parent / "facts").read_text().split())
    assert new < answered == requests
