"""`stillhouse synthesize` end to end: from prompts to chats in a JSONL file that training reads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.check import check_recipe
from stillhouse.commands import synthesize_text
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.data.data_config import FileSource
from stillhouse.data.documents import Conversation
from stillhouse.data.sources import read_sources
from stillhouse.errors import DataError, EndpointError, RecipeError, RunError
from stillhouse.generation.budget import Spending
from stillhouse.generation.journal import Journal
from stillhouse.language_model.synthesis_stage import synthesis_job
from stillhouse.synthesis.synthesize import Synthesis, estimate_synthesis
from tests import forks, tiny
from tests.generation.pools import committed
from tests.generation.stub import Reply, Stub, error

pytestmark = pytest.mark.run

KEY = "sk-very-secret-1234567890"
PRICE = {"input": 1.0, "output": 10.0}


def write(folder: Path, url: str, *, name: str = "tiny", **changes: Any) -> Path:
    """A recipe whose prompts are the lines of prompts.txt."""
    if not (folder / "prompts.txt").exists():
        (folder / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(12)))
    api = {"base_url": url, "model": "teacher", **changes.pop("api", {})}
    section = {
        "teacher": {"api": api},
        "prompts": {"path": "prompts.txt", **changes.pop("prompts", {})},
        "sampling": {"max_tokens": 20},
        **changes,
    }
    raw = tiny.recipe(folder, name=name, folder=str(folder / "runs" / name), synthesize=section)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def rows(result: Synthesis | None) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in result.out.read_text().splitlines()]


def echo(number: int, payload: dict[str, Any]) -> Reply:
    return Reply(text=f"answer to {payload['messages'][-1]['content']}")


# --- an API ------------------------------------------------------------------------------------


def test_each_prompt_becomes_a_chat_that_training_can_read(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        result = synthesize_text(write(tmp_path, stub.url, api={"price": PRICE}))
    assert rows(result)[3] == [
        {"role": "user", "content": "question 3"},
        {"role": "assistant", "content": "answer to question 3"},
    ]
    assert (result.requests, result.answered, result.new, result.kept) == (12, 12, 12, 12)
    assert result.tokens == 12 * 15
    assert result.usd == pytest.approx(12 * (10 * 1 + 5 * 10) / 1e6)
    source = FileSource(kind="jsonl", path="synthetic.jsonl")
    documents = list(read_sources([source], tmp_path))
    assert len(documents) == 12
    assert all(isinstance(document, Conversation) for document in documents)


def test_a_second_run_and_another_recipe_reuse_the_answers(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        first = synthesize_text(write(tmp_path, stub.url))
        content = first.out.read_bytes()
        again = synthesize_text(write(tmp_path, stub.url))
        assert len(stub.payloads) == 12
        assert again.new == 0
        assert again.out.read_bytes() == content
        more = {"samples": 2}
        other = synthesize_text(write(tmp_path, stub.url, name="other", prompts=more))
        assert len(stub.payloads) == 24
    assert (other.requests, other.new) == (24, 12)


def test_a_temperature_of_null_is_not_sent(tmp_path: Path) -> None:
    sampling = {"temperature": None, "max_tokens": 20}
    with Stub(echo) as stub:
        synthesize_text(write(tmp_path, stub.url, sampling=sampling, prompts={"samples": 2}))
        assert len(stub.payloads) == 24
        assert all("temperature" not in payload for payload in stub.payloads)


def test_the_student_sees_less_than_the_teacher(tmp_path: Path) -> None:
    prompts = {"system": "Be brief.", "examples": [{"prompt": "1 + 1?", "answer": "2"}]}
    with Stub(echo) as stub:
        result = synthesize_text(write(tmp_path, stub.url, prompts={**prompts, "limit": 1}))
        asked = stub.payloads[0]["messages"]
    assert [m["content"] for m in asked] == ["Be brief.", "1 + 1?", "2", "question 0"]
    assert [m["role"] for m in rows(result)[0]] == ["system", "user", "assistant"]


def test_filters_drop_rows_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "exam.txt").write_text("question 7\n")
    texts = {1: "I'm sorry, but I can't.", 2: "no number", 3: "<think>3?</think> 3"}

    def script(number: int, payload: dict[str, Any]) -> Reply:
        n = int(payload["messages"][-1]["content"].split()[1])
        return Reply(text=texts.get(n, f"{n}"), finish_reason="length" if n == 4 else "stop")

    filters = {"require_pattern": r"^\d+$", "decontaminate": {"path": "exam.txt"}}
    with Stub(script) as stub:
        result = synthesize_text(write(tmp_path, stub.url, filters=filters))
    assert result.dropped == {
        "empty": 0,
        "truncated": 1,
        "refusals": 1,
        "require_pattern": 1,
        "decontaminate": 1,
        "exact_duplicates": 0,
    }
    assert [row[-1]["content"] for row in rows(result)] == [
        "0",
        "3",
        "5",
        "6",
        "8",
        "9",
        "10",
        "11",
    ]
    dropped = [json.loads(line) for line in result.dropped_rows.read_text().splitlines()]
    assert {row["where"].split(":")[-1] for row in dropped} == {"2", "3", "5", "8"}


def test_the_budget_counts_the_tokens_of_earlier_runs(tmp_path: Path) -> None:
    with Stub(lambda number, payload: Reply(text=f"{number}", usage=(30, 20))) as stub:
        limited: dict[str, Any] = {"budget": {"max_tokens": 400}}
        first = synthesize_text(write(tmp_path, stub.url, **limited))
        paid = len(stub.payloads)
        again = synthesize_text(write(tmp_path, stub.url, **limited))
        assert len(stub.payloads) == paid
    assert first.out_of_budget
    assert again.out_of_budget
    assert 0 < first.kept == again.kept < 12
    assert first.tokens <= 400


def test_a_budget_that_suffices_for_no_request_is_the_error(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        with pytest.raises(RunError, match="no request is answered, because the budget") as caught:
            synthesize_text(write(tmp_path, stub.url, budget={"max_tokens": 1}))
        assert stub.payloads == []
    assert str(caught.value.fix).startswith("raise synthesize.budget;")


def test_ten_copies_of_a_prompt_are_paid_for_once(tmp_path: Path) -> None:
    """Each answer takes 50 tokens; the budget is enough for two answers, but not for eleven."""
    (tmp_path / "prompts.txt").write_text("the same\n" * 10 + "another\n")
    with Stub(lambda n, p: Reply(text=f"{n}", usage=(30, 20))) as stub:
        recipe = write(tmp_path, stub.url, filters={"exact_duplicates": False})
        synthesize_text(recipe, ["synthesize.prompts.limit=10"])
        loaded = tiny.parsed(yaml.safe_load(recipe.read_text()))
        assert loaded.synthesize is not None
        known = estimate_synthesis(synthesis_job(loaded, tmp_path))
        again = synthesize_text(recipe, ["synthesize.budget.max_tokens=200"])
        assert len(stub.payloads) == 2
    assert (known.requests, known.missing, known.spent.tokens) == (11, 1, 50)
    assert known.likely == Spending(50, 0.0)
    assert known.worst.tokens < 100
    assert (again.kept, again.tokens) == (11, 100)


def test_an_unknown_price_is_reported_as_unknown(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        result = synthesize_text(write(tmp_path, stub.url))
    assert result.cost == "unknown"
    assert dict(result.lines())["cost"] == "unknown"


def test_no_file_of_a_run_contains_the_api_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if the server repeats it in an error message, for one request or for all."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    api = {"key_env": "TEACHER_KEY"}

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return error(400, f"you sent {KEY}") if number == 0 else Reply(text=f"{number}")

    with Stub(script, key=KEY) as stub:
        result = synthesize_text(write(tmp_path, stub.url, api=api))
    assert (result.answered, result.failed) == (11, 1)
    with Stub(key="another") as stub, pytest.raises(EndpointError):
        synthesize_text(write(tmp_path, stub.url, api=api, name="refused"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "answers.sqlite", "synthetic.jsonl", "summary.json"} <= {
        path.name for path in files
    }
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_if_no_request_is_answered_the_last_failure_is_the_error(tmp_path: Path) -> None:
    with (
        Stub(lambda n, p: error(400, "unknown parameter: top_p")) as stub,
        pytest.raises(EndpointError, match="unknown parameter: top_p"),
    ):
        synthesize_text(write(tmp_path, stub.url))


def test_if_no_row_is_left_the_error_names_the_file_of_dropped_rows(tmp_path: Path) -> None:
    with (
        Stub(lambda n, p: Reply(text="I cannot help with that.")) as stub,
        pytest.raises(DataError, match="the filters dropped all 12 answers") as caught,
    ):
        synthesize_text(write(tmp_path, stub.url))
    assert str(caught.value.where).endswith("dropped.jsonl")
    assert "loosen synthesize.filters" in str(caught.value.fix)
    assert "max_tokens" not in str(caught.value.fix)


def test_if_all_answers_are_cut_off_the_error_names_the_token_limit(tmp_path: Path) -> None:
    reply = Reply(text="<think>so", finish_reason="length")
    with (
        Stub(lambda n, p: reply) as stub,
        pytest.raises(DataError, match="filters dropped all") as caught,
    ):
        synthesize_text(write(tmp_path, stub.url))
    assert str(caught.value.fix).startswith(
        "raise synthesize.sampling.max_tokens, which cut off 12"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompts": {"path": "nowhere.txt"}}, "does not exist"),
        ({"filters": {"json_schema": "nowhere.json"}}, "json_schema does not exist"),
        ({"filters": {"require_pattern": "("}}, "not a regular expression"),
        ({"api": {"key_env": "NOT_SET_AT_ALL"}}, "NOT_SET_AT_ALL is not set"),
    ],
)
def test_a_mistake_is_found_before_any_request_is_sent(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with Stub(echo) as stub:
        with pytest.raises((DataError, RecipeError, EndpointError), match=expected):
            synthesize_text(write(tmp_path, stub.url, **changes))
        assert stub.payloads == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": {}}, "one of api, local, and vllm"),
        ({"budget": {"max_usd": 1}}, "max_usd needs teacher.api.price"),
        ({"sampling": {"extra": {"n": 4}}}, "n cannot be set"),
        (
            {"prompts": {"path": "p.txt", "samples": 4}, "sampling": {"temperature": 0}},
            "all samples are identical",
        ),
        (
            {"teacher": {"local": {}}, "sampling": {"temperature": None}},
            "no default temperature",
        ),
        ({"teacher": {"local": {"revision": "v1"}}}, "revision applies to the model"),
        ({"teacher": {"vllm": {"revision": "v1"}}}, "revision applies to the model"),
        (
            {"teacher": {"local": {}}, "budget": {"max_tokens": 9}},
            "a budget is for teacher.api",
        ),
        (
            {"teacher": {"api": {"base_url": "http://me:pw@x/v1", "model": "m"}}},
            "must not contain a user",
        ),
    ],
)
def test_contradictory_keys_are_rejected(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    section = {
        "teacher": {"api": {"base_url": "http://x/v1", "model": "m"}},
        "prompts": {"path": "p.txt"},
        **changes,
    }
    with pytest.raises(RecipeError, match=expected) as caught:
        parse_recipe(tiny.recipe(tmp_path, synthesize=section))
    assert "pw@" not in str(caught.value)


def test_a_recipe_without_a_synthesize_section_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe(tmp_path)))
    with pytest.raises(RecipeError, match="synthesizes nothing"):
        synthesize_text(path)


def test_check_estimates_the_cost_from_the_answers_so_far(tmp_path: Path) -> None:
    def synthesis(recipe: Path) -> str:
        return next(f.text for f in check_recipe(recipe) if f.topic == "synthesis")

    with Stub(echo) as stub:
        recipe = write(tmp_path, stub.url, api={"price": {"input": 1000, "output": 10000}})
        before = synthesis(recipe)
        assert not (tmp_path / "runs").exists()
        synthesize_text(recipe, ["synthesize.prompts.limit=3"])
        after = synthesis(recipe)
        assert len(stub.payloads) == 3
        synthesize_text(recipe)
        done = synthesis(recipe)
    assert before.startswith("0 of 12 requests are answered; the rest takes at most ")
    assert after.startswith(
        "3 of 12 requests are answered; the rest takes about 135 tokens, $0.54 "
        "(95% likely: $0.54 to $0.54); at most "
    )
    assert done == "12 of 12 requests are answered"


def test_the_summary_includes_what_lost_answers_may_have_cost(tmp_path: Path) -> None:
    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(how="cut") if number == 0 else echo(number, payload)

    with Stub(script) as stub:
        recipe = write(tmp_path, stub.url, api={"price": PRICE, "concurrency": 1})
        whole = synthesize_text(recipe)
        again = synthesize_text(recipe)
    assert whole.answered == 12
    assert whole.usd == pytest.approx(12 * (10 * 1 + 5 * 10) / 1e6)
    assert whole.lost_tokens > 20
    assert whole.lost_usd > 20 * 10 / 1e6
    lost = dict(whole.lines())["lost"]
    assert lost == (
        f"at most ${whole.lost_usd:.4f}, {whole.lost_tokens} tokens, billed but not received"
    )
    assert again.lost_usd == whole.lost_usd


# --- interruptions -----------------------------------------------------------------------------


@pytest.mark.run
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_run_resumes_and_repeats_at_most_the_requests_in_flight(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The run is stopped with 60 answers in the journal and four requests in flight."""
    released = threading.Event()

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return Reply(text=f"{number}", when=lambda: number < 60 or released.is_set())

    journal_file = tmp_path / "runs" / "answers.sqlite"
    with Stub(script) as stub:
        api = {"concurrency": 4}
        (tmp_path / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(150)))
        recipe = write(tmp_path, stub.url, api=api)
        process = forks.stillhouse("synthesize", str(recipe))
        while len(stub.payloads) < 64 or committed(journal_file) < 60:
            time.sleep(0.01)
            assert process.poll() is None, process.communicate()[1]
        process.send_signal(number)
        while number == signal.SIGINT and "waiting for requests in flight" not in process.errors():
            time.sleep(0.01)
        released.set()
        process.communicate(timeout=300)
        assert process.poll() == (-9 if number == signal.SIGKILL else 130)
        sent = len(stub.payloads)
        assert sent == 64
        with Journal(journal_file) as journal:
            answers, _ = journal.counts()
        result = synthesize_text(recipe)
        # kill -9 loses at most the answers in flight.
        assert sent - answers <= (4 if number == signal.SIGKILL else 0)
        assert len(stub.payloads) == sent + 150 - answers
    assert result.kept == 150


# --- a local model -----------------------------------------------------------------------------


@pytest.mark.run
def test_answers_of_a_local_teacher_are_reused_and_reproducible(tmp_path: Path) -> None:
    section = {
        "teacher": {"local": {"batch": 4, "precision": "float32"}},
        "prompts": {"path": "prompts.txt", "samples": 2},
        "sampling": {"max_tokens": 8, "temperature": 1.0},
        "filters": {"truncated": False, "exact_duplicates": False},
    }
    recipe = write(tmp_path, "http://unused/v1")
    raw = {**yaml.safe_load(recipe.read_text()), "synthesize": section}
    recipe.write_text(yaml.safe_dump(raw))
    first = synthesize_text(recipe)
    assert (first.requests, first.answered, first.new) == (24, 24, 24)
    assert first.cost == "$0.0000"
    content = first.out.read_bytes()
    assert synthesize_text(recipe).new == 0
    (tmp_path / "runs" / "answers.sqlite").unlink()
    assert synthesize_text(recipe).new == 0, "the stage is complete"
    shutil.rmtree(tmp_path / "runs" / "tiny" / "stages")
    assert synthesize_text(recipe).new == 24
    assert first.out.read_bytes() == content, "the same seed gives the same answers"
    other = synthesize_text(recipe, ["seed=1"])
    assert other.new == 24
    assert other.out.read_bytes() != content


def test_a_file_that_the_run_did_not_write_is_not_overwritten(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        path = write(tmp_path, stub.url, out="mine.jsonl")
        (tmp_path / "mine.jsonl").write_text("my own rows\n")
        (error,) = [one for one in check_recipe(path) if one.level == "error"]
        assert "mine.jsonl, but the run folder has no record" in error.text
        done = synthesize_text(path)
    assert (tmp_path / "mine.jsonl").read_text() == "my own rows\n"
    assert len(rows(done)) == done.kept


def test_an_unusable_output_path_is_found_before_any_request_is_sent(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        path = write(tmp_path, stub.url, out="mine")
        (tmp_path / "mine").mkdir()
        with pytest.raises(RunError, match="there is a folder"):
            synthesize_text(path)
        assert stub.payloads == []
        path = write(tmp_path, stub.url, out="tiny.yaml/text.jsonl")
        with pytest.raises(RunError, match="there is a file where a folder should be"):
            synthesize_text(path)
        assert stub.payloads == []
    assert os.listdir(tmp_path / "mine") == []


def test_a_full_disk_is_reported_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_text: Path, temporary: Path) -> None:
        temporary.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with Stub(echo) as stub:
        path = write(tmp_path, stub.url, out="other-disk/text.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr("stillhouse.language_model.synthesis_stage.shutil.copyfile", full)
            with pytest.raises(RunError, match="the disk is full") as caught:
                synthesize_text(path)
        assert caught.value.where == str(tmp_path / "other-disk" / "text.jsonl")
        assert os.listdir(tmp_path / "other-disk") == []
        assert synthesize_text(path).new == 0
    assert os.listdir(tmp_path / "other-disk") == ["text.jsonl"]


def test_text_that_the_recipe_wrote_earlier_is_replaced(tmp_path: Path) -> None:
    with Stub(echo) as stub:
        first = synthesize_text(write(tmp_path, stub.url))
        before = first.out.read_text()
        other: dict[str, Any] = {"filters": {"forbid_pattern": "question 7$"}}
        again = synthesize_text(write(tmp_path, stub.url, **other))
        assert again.out.read_text() != before
        synthesize_text(write(tmp_path, stub.url))
    assert first.out.read_text() == before
