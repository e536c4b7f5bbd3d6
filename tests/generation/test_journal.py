"""The journal commits every answer when it arrives, so that none is lost or paid for twice."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from stillhouse.errors import RunError
from stillhouse.generation import journal_file
from stillhouse.generation.budget import Spending
from stillhouse.generation.journal import Journal
from stillhouse.generation.journal_file import journal_damage
from stillhouse.generation.request import Answer, Failure, Request, endpoint_of

REQUEST = Request(
    "https://api.example.org/v1",
    "big-model",
    ({"role": "user", "content": "Say hello."},),
    {"temperature": 0.7, "max_tokens": 32},
)
ANSWER = Answer(
    text="Hello — 你好",
    finish_reason="stop",
    reasoning="A greeting.",
    prompt_tokens=9,
    completion_tokens=2,
    cost=0.00012,
    seconds=0.25,
    logprobs=[{"token": "Hello", "logprob": -0.1, "top_logprobs": []}],
)


# --- the key -----------------------------------------------------------------------------------


def test_the_key_of_a_request_does_not_depend_on_the_order_of_its_parts() -> None:
    reordered = Request(
        REQUEST.endpoint,
        REQUEST.model,
        ({"content": "Say hello.", "role": "user"},),
        {"max_tokens": 32, "temperature": 0.7},
    )
    assert reordered.key == REQUEST.key
    assert len(REQUEST.key) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "https://api.example.org/v2"},
        {"model": "small-model"},
        {"messages": ({"role": "user", "content": "Say hello!"},)},
        {"parameters": {"temperature": 0.8, "max_tokens": 32}},
        {"sample": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_affects_the_answer_changes_the_key(change: dict[str, object]) -> None:
    assert replace(REQUEST, **change).key != REQUEST.key  # type: ignore[arg-type]


def test_credentials_are_removed_from_an_endpoint() -> None:
    given = "https://ann:secret@api.example.org:8443/v1/?token=secret"
    assert endpoint_of(given) == "https://api.example.org:8443/v1"
    assert endpoint_of("http://127.0.0.1:8080") == "http://127.0.0.1:8080"


# --- answers and failures ----------------------------------------------------------------------


def test_a_stored_answer_is_returned_complete(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.get(REQUEST.key) is None
        journal.record(REQUEST, ANSWER).result(timeout=10)
        assert journal.get(REQUEST.key) == ANSWER
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.get(REQUEST.key) == ANSWER


def test_the_first_answer_is_kept(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record(REQUEST, ANSWER).result(timeout=10)
        journal.record(REQUEST, replace(ANSWER, text="another")).result(timeout=10)
        assert journal.get(REQUEST.key) == ANSWER
        assert journal.counts() == (1, 0)


def test_failures_keep_their_reason_and_what_they_may_have_cost(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record_failure(REQUEST, Failure("timeout", "no answer in 60 s", 3, 0.02, 700))
        journal.record_failure(REQUEST, Failure("server", "500", 1)).result(timeout=10)
        assert [(kind, reason) for _, kind, reason in journal.failures()] == [
            ("timeout", "no answer in 60 s"),
            ("server", "500"),
        ]
        assert journal.billed_failures(REQUEST.key) == Spending(700, 0.02)
        assert journal.get(REQUEST.key) is None


def test_a_lone_surrogate_is_stored_as_a_question_mark(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record(REQUEST, replace(ANSWER, text="half \ud83d")).result(timeout=10)
        answer = journal.get(REQUEST.key)
        assert answer is not None
        assert answer.text == "half ?"


def test_a_row_that_cannot_be_stored_does_not_affect_the_others(tmp_path: Path) -> None:
    odd = replace(ANSWER, finish_reason={"type": "stop"})  # type: ignore[arg-type]
    with Journal(tmp_path / "j.sqlite") as journal:
        with journal._reading:  # all of them wait for one commit
            journal._reader.execute("BEGIN IMMEDIATE")
            done = [
                journal.record(replace(REQUEST, sample=n), odd if n == 7 else ANSWER)
                for n in range(20)
            ]
            journal._reader.execute("COMMIT")
        failed = [n for n, future in enumerate(done) if future.exception(timeout=10)]
        assert failed == [7]
        assert journal.counts() == (19, 0)


def test_closing_commits_the_rows_that_are_waiting(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    for sample in range(3000):
        journal.record(replace(REQUEST, sample=sample), ANSWER)
    journal.close()
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.counts() == (3000, 0)


# --- kills, and files that cannot be used ------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Request
journal = Journal(Path(sys.argv[1]))
for sample in range(10**9):
    request = Request("local", "m", ({"role": "user", "content": "x"},), {}, sample)
    done = journal.record(request, Answer(f"answer {sample}"))
    done.add_done_callback(lambda _, sample=sample: print(sample, flush=True))
"""


@pytest.mark.run
def test_kill_9_loses_no_answer_that_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    committed = [int(writer.stdout.readline()) for _ in range(500)]
    writer.send_signal(signal.SIGKILL)
    lines = writer.stdout.read().split("\n")
    writer.wait()
    committed += [int(line) for line in lines[:-1]]
    with Journal(path) as journal:
        for sample in committed:
            request = Request("local", "m", ({"role": "user", "content": "x"},), {}, sample)
            answer = journal.get(request.key)
            assert answer is not None
            assert answer.text == f"answer {sample}"


def test_a_journal_can_be_opened_only_once_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "j.sqlite"),
        pytest.raises(RunError, match="another process is writing this journal"),
    ):
        Journal(tmp_path / "j.sqlite")
    Journal(tmp_path / "j.sqlite").close()


def test_a_file_that_is_not_a_journal_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, not a database\n" * 100)
    with pytest.raises(RunError, match="not a database"):
        Journal(path)
    assert path.read_text().startswith("these are my notes")


def test_a_database_of_another_program_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "library.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE answers (a); INSERT INTO answers VALUES (1);")
    before = path.read_bytes()
    with pytest.raises(RunError, match="this SQLite file is not a journal"):
        Journal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("end", ["", "-wal", "-shm", ".lock"])
def test_a_folder_in_place_of_a_file_of_the_journal_is_reported(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"j.sqlite{end}"
    path.mkdir()
    with pytest.raises(RunError, match="there is a folder") as caught:
        Journal(tmp_path / "j.sqlite")
    assert caught.value.where == str(path)


def test_the_name_of_a_journals_folder_may_contain_special_characters(tmp_path: Path) -> None:
    path = tmp_path / "100%20 of?#" / "j.sqlite"
    path.parent.mkdir()
    Journal(path).close()
    assert journal_damage(path) is None
    Journal(path).close()


@pytest.mark.parametrize("fails", [2, 3])
def test_a_journal_that_cannot_be_opened_for_writing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """If only a later connection fails, no caller waits for a commit that never happens."""
    plain, opened = journal_file._connect, []

    def connect(path: Path) -> sqlite3.Connection:
        opened.append(path)
        if len(opened) == fails:
            raise sqlite3.OperationalError("unable to open database file")
        return plain(path)

    monkeypatch.setattr(journal_file, "_connect", connect)
    with pytest.raises(RunError, match="unable to open"):
        Journal(tmp_path / "j.sqlite")
    Journal(tmp_path / "j.sqlite").close()


def test_a_commit_cannot_be_cancelled(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        assert not journal.record(REQUEST, ANSWER).cancel()
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.get(REQUEST.key) == ANSWER


def test_a_journal_of_a_later_format_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    Journal(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(RunError, match="format 99"):
        Journal(path)


def test_an_answer_that_cannot_be_committed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with Journal(path) as journal:
        journal.record(REQUEST, ANSWER).result(timeout=10)
        with sqlite3.connect(path) as other:
            other.execute("DROP TABLE answers")
        done = journal.record(replace(REQUEST, sample=1), ANSWER)
        with pytest.raises(RunError, match="no such table"):
            done.result(timeout=10)


# --- reservations ------------------------------------------------------------------------------


def test_a_request_that_was_in_flight_at_a_kill_counts_as_billed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "j.sqlite"
    with Journal(path) as journal:  # as in a killed run, neither recorded nor released
        journal.reserve(REQUEST, 0.02, 700).result(timeout=10)
        assert journal.billed_failures(REQUEST.key) == Spending(0, 0.0)
    with Journal(path) as journal:
        assert journal.billed_failures(REQUEST.key) == Spending(700, 0.02)
        assert "1 requests were in flight" in capfd.readouterr().err
    with Journal(path) as journal:  # counted only once
        assert journal.billed_failures(REQUEST.key) == Spending(700, 0.02)


@pytest.mark.parametrize("end", ["answer", "failure", "release"])
def test_a_reservation_ends_with_its_request(tmp_path: Path, end: str) -> None:
    path = tmp_path / "j.sqlite"
    with Journal(path) as journal:
        journal.reserve(REQUEST, 0.02, 700)
        if end == "answer":
            journal.record(REQUEST, ANSWER)
        elif end == "failure":
            journal.record_failure(REQUEST, Failure("server", "500"))
        else:
            journal.release(REQUEST)
    with Journal(path) as journal:
        assert journal.billed_failures(REQUEST.key) == Spending(0, 0.0)


# --- damage ------------------------------------------------------------------------------------


def filled(path: Path, answers: int = 400) -> None:
    with Journal(path) as journal:
        for sample in range(answers):
            journal.record(replace(REQUEST, sample=sample), replace(ANSWER, text=f"text {sample}"))


def whole_answers(path: Path, answers: int = 400) -> int:
    """The number of answers in the journal, each of which must be the one that was recorded."""
    found = 0
    with Journal(path) as journal:
        for sample in range(answers):
            answer = journal.get(replace(REQUEST, sample=sample).key)
            if answer is not None:
                assert answer == replace(ANSWER, text=f"text {sample}")
                found += 1
    return found


def test_an_answer_with_a_changed_letter_is_dropped_and_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "j.sqlite"
    filled(path)
    content = path.read_bytes()
    assert content.count(b"text 123") == 1
    path.write_bytes(content.replace(b"text 123", b"text 321"))
    assert whole_answers(path) == 399
    said = capfd.readouterr().err
    assert "was damaged (an answer in it has changed): 399 answers are kept" in said
    assert "has lost 1 of 400 answers: they are requested again" in said
    assert (tmp_path / "j.sqlite.damaged-1").exists()


def test_a_changed_cost_of_a_failed_request_is_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "j.sqlite"
    with Journal(path) as journal:
        journal.record(REQUEST, ANSWER)
        for reason in ("first", "second"):
            journal.record_failure(REQUEST, Failure("timeout", reason, 1, 0.5, 1000))
    content = path.read_bytes()
    at = content.index(b"second")
    changed = content[:at] + content[at:].replace(b"\x3f\xe0\0", b"\x3e\xe0\0", 1)  # 0.5
    assert changed != content
    path.write_bytes(changed)
    with Journal(path) as journal:
        assert journal.billed_failures(REQUEST.key) == Spending(1000, 0.5)
        assert journal.get(REQUEST.key) == ANSWER
    said = capfd.readouterr().err
    assert "was damaged (a failed request in it has changed): 1 answers are kept" in said
    assert "1 failed requests in it are lost" in said


def test_zeroed_pages_lose_only_the_answers_in_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "j.sqlite"
    filled(path)
    content = bytearray(path.read_bytes())
    leaf = 10  # the type of an SQLite page that contains rows, not the numbers of other pages
    pages = range(len(content) // 2 // 4096 * 4096, len(content), 4096)
    middle = next(at for at in pages if content[at] == content[at + 4096] == leaf)
    content[middle : middle + 2 * 4096] = bytes(2 * 4096)
    path.write_bytes(content)
    kept = whole_answers(path)
    assert 300 < kept < 400
    assert f"has lost {400 - kept} of 400 answers" in capfd.readouterr().err


def test_answers_lost_with_a_write_ahead_log_are_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SQLite opens such a file as if nothing were wrong."""
    path = tmp_path / "j.sqlite"
    filled(path, 10)
    before = path.read_bytes()
    filled(path, 30)
    path.write_bytes(before)
    assert whole_answers(path, 30) == 10
    assert "has lost 20 of 30 answers" in capfd.readouterr().err


def test_failed_requests_lost_with_a_write_ahead_log_are_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "j.sqlite"
    filled(path, 10)
    before = path.read_bytes()
    with Journal(path) as journal:
        journal.record_failure(REQUEST, Failure("timeout", "late", 1, 0.5, 1000)).result(10)
        journal.reserve(REQUEST, 0.5, 1000).result(10)
    path.write_bytes(before)
    assert whole_answers(path, 10) == 10
    assert "has lost its last 2 writes" in capfd.readouterr().err
    assert whole_answers(path, 10) == 10
    assert "lost" not in capfd.readouterr().err, "the loss is reported once"


def test_a_commit_is_counted_before_its_caller_is_notified(tmp_path: Path) -> None:
    """So that its loss is reported, no matter when the process is killed."""
    lock = tmp_path / "j.sqlite.lock"
    with Journal(tmp_path / "j.sqlite") as journal:
        counts = []
        for sample in range(50):
            journal.record(replace(REQUEST, sample=sample), ANSWER).result(10)
            counts.append([int(word) for word in lock.read_text().split()])
    assert counts == [[n, n] for n in range(1, 51)]


@pytest.mark.parametrize("seed", range(20))
def test_no_flipped_bit_changes_an_answer(tmp_path: Path, seed: int) -> None:
    """Each is detected, or in unused space."""
    path = tmp_path / "j.sqlite"
    filled(path, 60)
    content, chance = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(8):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    with suppress(RunError):
        whole_answers(path, 60)


def test_a_journal_of_the_first_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    filled(path, 10)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE answers DROP COLUMN xxh3")
        connection.execute("ALTER TABLE failures DROP COLUMN xxh3")
        connection.execute("DROP TABLE reservations")
        connection.execute("DROP TABLE commits")
        connection.execute("PRAGMA user_version = 1")
    assert journal_damage(path) is None
    assert whole_answers(path, 10) == 10
    filled(path, 20)
    assert whole_answers(path, 20) == 20
