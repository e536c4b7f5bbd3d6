"""The commands, their help, and how errors are shown."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import stillhouse
from stillhouse import cli
from stillhouse.check import check_recipe
from stillhouse.cli import exits, stop_signals
from stillhouse.cli.exits import open_standard_streams
from stillhouse.cli.options import output_file
from stillhouse.commands import record_signals
from stillhouse.errors import DataError, StillhouseError
from stillhouse.finding import Finding
from stillhouse.progress import note
from tests import forks, tiny
from tests.classify import toys
from tests.forks import Fork

COMMANDS = (
    "run",
    "cascade",
    "synthesize",
    "check",
    "plan",
    "preview",
    "verify",
    "predict",
    "evaluate",
    "report",
    "watch",
    "doctor",
    "init",
    "schema",
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def write(folder: Path, /, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe(folder, **sections)))
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_in_its_help(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"stillhouse {name}" in result.output


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version").output == f"stillhouse {stillhouse.__version__}\n"


@pytest.mark.parametrize("name", ["", "record", "verify", "info", "export", "push", "pull"])
def test_every_signals_command_has_an_example_in_its_help(name: str) -> None:
    result = call("signals", *([name] if name else []), "--help")
    assert result.exit_code == 0
    assert f"stillhouse signals {name}".replace("record", "recipes") in result.output


def test_no_command_is_missing_from_the_list() -> None:
    found = {command.callback.__name__ for command in cli.app.registered_commands}
    assert found == set(COMMANDS)


def test_synthesize_rejects_the_recipe_of_a_task(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(toys.recipe(tmp_path)))
    error = call("synthesize", str(recipe)).exception
    assert isinstance(error, StillhouseError)
    assert "has a task" in str(error)


@pytest.mark.run
def test_check_warns_of_sizes_that_a_format_cannot_hold(tmp_path: Path) -> None:
    words = tiny.merging_tokenizer()
    tiny.llama(vocab_size=len(words)).save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    found = check_recipe(
        write(tmp_path, student={"ffn_size": 40}, export={"formats": ["gguf-q8_0"]})
    )
    [warning] = [finding for finding in found if finding.topic == "export" and finding.fix]
    assert "intermediate_size 40" in warning.text
    assert "32 or 64" in str(warning.fix)


@pytest.mark.run
def test_check_rejects_a_tokenizer_that_gguf_cannot_hold(tmp_path: Path) -> None:
    last = check_recipe(write(tmp_path, export={"formats": ["gguf-f16"]}))[-1]
    assert last.level == "error"
    assert "without merges" in last.text


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"group_size": 64}, "not a multiple of group_size 64"),
        ({"keep": ["layers.7"]}, r"no part named 'layers\.7'"),
        ({"max_bytes": 1000}, "more than 1,000"),
    ],
)
def test_check_rejects_models_that_cannot_be_quantized(
    tmp_path: Path, quantize: dict[str, Any], message: str
) -> None:
    last = check_recipe(write(tmp_path, quantize=quantize))[-1]
    assert last.level == "error"
    assert re.search(message, last.text)


@pytest.mark.parametrize(("license_", "warns"), [("apache-2.0", 0), ("llama3.2", 1), (None, 1)])
def test_check_warns_of_a_license_that_restricts_students(
    tmp_path: Path, license_: str | None, warns: int
) -> None:
    found = check_recipe(write(tmp_path, teacher={"license": license_}))
    assert [f.level for f in found if f.topic == "license"] == ["warning"] * warns


@pytest.mark.run
def test_signals_are_recorded_shown_exported_and_verified(tmp_path: Path) -> None:
    recipe = write(tmp_path, signals={"encoding": {"kind": "top_k", "k": 8}})
    recorded = call("signals", str(recipe))
    assert recorded.exit_code == 0, recorded.output
    store = tmp_path / "run" / "signals"
    assert call("signals", "verify", str(store)).exit_code == 0
    assert "top_k" in call("signals", "info", str(store)).output
    parquet = tmp_path / "signals.parquet"
    exported = call("signals", "export", str(store), "--parquet", str(parquet))
    assert exported.exit_code == 0
    assert parquet.stat().st_size > 0
    shard = next((store / "shards").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert call("signals", "verify", str(store)).exit_code == 1


def test_a_recipe_without_signals_is_an_error(tmp_path: Path) -> None:
    result = call("signals", str(write(tmp_path)))
    assert isinstance(result.exception, StillhouseError)
    assert "records no signals" in str(result.exception)
    assert "add `signals: {}`" in str(result.exception.fix)


def test_a_recipe_with_a_finished_store_records_no_signals(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="records no signals") as caught:
        record_signals(write(tmp_path), ["signals.store=elsewhere"])
    assert "--set signals.store=null" in str(caught.value.fix)


def test_doctor_shows_versions_and_extras() -> None:
    output = call("doctor").output
    for word in ("torch", "transformers", "precision", "memory"):
        assert word in output
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in set(project["optional-dependencies"]) - {"dev"}:
        assert f"extra {extra} " in output


def test_schema_is_json() -> None:
    assert json.loads(call("schema").output)["title"] == "Stillhouse recipe"


def test_preview_shows_the_text(tmp_path: Path) -> None:
    output = call("preview", str(write(tmp_path)), "--rows", "2").output
    assert any(word in output for word in ("cat", "dog", "friend", "man", "she"))


@pytest.mark.run
def test_run_then_report_and_evaluate(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    result = call("run", str(recipe))
    assert result.exit_code == 0, result.output
    assert "teacher" in result.output
    assert f"next    stillhouse watch {tmp_path}" in result.output
    assert call("report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")).exit_code == 0
    assert (tmp_path / "r.html").read_text() == (tmp_path / "run" / "report.html").read_text()
    figures = tmp_path / "figures.json"
    assert call("evaluate", str(recipe), "--json", str(figures)).exit_code == 0
    assert [m["role"] for m in json.loads(figures.read_text())["models"]] == ["teacher", "student"]


def test_a_users_error_is_one_message_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["stillhouse", "run", "nowhere.yaml"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the recipe file does not exist")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "x" * 400],
        ["report", "x" * 400],
        ["predict", "x" * 400],
        ["signals", "info", "x" * 400],
        ["init", "--from", "x" * 400],
        ["init", "--from", "/dev/zero"],
        ["run", "/dev/zero"],
    ],
)
def test_paths_that_cannot_be_read_are_one_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stillhouse", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert arguments[-1] in error
    assert "Traceback" not in error


def test_predict_answers_a_line_before_the_next_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()

    def predictor(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
        for text in list(texts):
            yield {"text": text}
            if text == "one":
                assert capsys.readouterr().out == '{"text": "one"}\n'
                os.write(writing, b"two\n")
                os.close(writing)

    monkeypatch.setattr("stillhouse.commands.find_predictor", lambda folder: predictor)
    os.write(writing, b"one\n")
    with open(reading, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        cli.predict(tmp_path, "-", "text")
    assert capsys.readouterr().out == '{"text": "two"}\n'


@pytest.mark.parametrize("number", ["-1", "1e5", "nan", "true", f"1{'0' * 30}"])
@pytest.mark.parametrize("option", [("check", "--calls"), ("preview", "--rows")])
def test_options_reject_impossible_numbers(option: tuple[str, str], number: str) -> None:
    result = call(option[0], "recipe.yaml", option[1], number)
    assert result.exit_code == 2
    assert "Invalid value" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "recipe.yaml", "--json"),
        ("report", "run", "--out"),
        ("signals", "export", "store", "--parquet"),
    ],
)
def test_files_that_cannot_be_written_are_rejected_before_the_work(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    for path in (tmp_path, tmp_path / "none" / "file"):
        result = call(*arguments, str(path))
        assert result.exit_code == 2
        assert "folder" in result.output


def test_a_folder_that_is_not_writable_is_rejected_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.cli.options.os.access", lambda path, mode: path != tmp_path)
    result = call("evaluate", "recipe.yaml", "--json", str(tmp_path / "figures.json"))
    assert result.exit_code == 2
    assert "writable" in result.output
    assert output_file(Path(os.devnull)) == Path(os.devnull)


def test_a_link_is_kept_when_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "figures.json").touch()
    (tmp_path / "latest.json").symlink_to("figures.json")
    assert output_file(tmp_path / "latest.json") == tmp_path / "figures.json"


def test_a_bug_is_reported_as_a_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "this is a bug in Stillhouse" in capsys.readouterr().err


def _print_the_schema() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.argv = ["stillhouse", "schema"]
    cli.main()


@pytest.mark.run
def test_a_full_disk_under_standard_output_is_one_error() -> None:
    process = Fork(_print_the_schema)
    _, error = process.communicate()
    assert process.wait() == 1
    assert error.startswith("error: the disk is full\n  where: standard output\n")


def _print_a_note() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    note("this line is lost")


@pytest.mark.run
def test_a_full_disk_under_the_log_does_not_end_a_run() -> None:
    assert Fork(_print_a_note).wait() == 0


def _in_a_deleted_folder(folder: Path) -> None:
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    forks.patch(cli, "app", Path.cwd)
    cli.main()


@pytest.mark.run
def test_a_deleted_current_folder_is_one_error(tmp_path: Path) -> None:
    process = Fork(_in_a_deleted_folder, tmp_path / "gone")
    _, error = process.communicate()
    assert process.wait() == 1
    assert error.startswith("error: the current folder was deleted\n  fix:")


def _without_streams(file: Path) -> None:
    for number in range(3):
        os.close(number)
    open_standard_streams()
    with file.open("wb") as opened:
        assert opened.fileno() > 2
        os.write(2, b"a warning of a library")


def test_a_closed_standard_input_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For `stillhouse predict model <&-`, Python sets sys.stdin to None."""
    monkeypatch.setattr(sys, "stdin", None)
    open_standard_streams()
    assert sys.stdin is not None
    assert not sys.stdin.isatty()


@pytest.mark.run
def test_output_of_a_library_is_not_written_to_a_file_by_mistake(tmp_path: Path) -> None:
    """If standard streams are closed, the next file that is opened would get one's descriptor."""
    assert Fork(_without_streams, tmp_path / "file").wait() == 0
    assert (tmp_path / "file").read_bytes() == b""


# --- check -------------------------------------------------------------------------------------


def levels(findings: list[Finding]) -> set[str]:
    return {finding.level for finding in findings}


def text_of(findings: list[Finding], topic: str) -> str:
    return next(finding.text for finding in findings if finding.topic == topic)


def test_a_good_recipe_has_no_error_and_leaves_no_run_folder(tmp_path: Path) -> None:
    findings = check_recipe(write(tmp_path))
    assert levels(findings) == {"ok", "estimate"}
    assert not (tmp_path / "run").exists()


def test_the_estimated_sizes_are_the_real_ones(tmp_path: Path) -> None:
    findings = check_recipe(write(tmp_path))
    teacher, student = tiny.llama(), tiny.llama(intermediate_size=32)
    share = student.num_parameters() / teacher.num_parameters()
    assert f"{share:.0%} of the teacher's" in text_of(findings, "student")
    everything = sum(len(line) + 1 for line in tiny.text(400).splitlines())
    assert f"{everything:,} tokens" in text_of(findings, "data")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"teacher": {"model": "./nowhere"}}, "nowhere"),
        ({"student": {"ffn_size": 999}}, "ffn_size: 999"),
        ({"train": {"batch_size": 4, "micro_batch_size": 3}}, "not a multiple"),
        ({"train": {"report_to": ["no_such_tracker"]}}, "no_such_tracker is not a tracker"),
        ({"data": {"sources": [{"kind": "text", "path": "missing.txt"}]}}, "missing.txt"),
    ],
    ids=["teacher", "size", "batch", "tracker", "source"],
)
def test_check_exits_with_1_if_the_run_would_fail(
    tmp_path: Path, sections: dict[str, Any], expected: str
) -> None:
    recipe = write(tmp_path, **sections)
    findings = check_recipe(recipe)
    assert expected in " ".join(f.text for f in findings if f.level == "error")
    assert call("check", str(recipe)).exit_code == 1


def test_check_rejects_a_chat_row_that_is_too_long(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 40, "completion": "b" * 40}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    findings = check_recipe(write(tmp_path, data={"sources": [source]}))
    assert "error" in levels(findings)
    assert "a row has 81 tokens" in " ".join(finding.text for finding in findings)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({}, "a second student or epoch trains"),
        ({"train": {"epochs": 3}}, "the teacher scores the same text 3 times"),
        ({"signals": {}}, "this pays off from the second student or epoch on"),
        ({"signals": {}, "train": {"epochs": 3}}, "over 3 epochs"),
    ],
)
def test_check_reports_when_a_store_saves_time(tmp_path: Path, sections: Any, text: str) -> None:
    found = {finding.topic: finding for finding in check_recipe(write(tmp_path, **sections))}
    assert text in found["signals"].text
    assert "kB" in found["signals"].text + str(found["signals"].fix)


@pytest.mark.run
def test_check_opens_the_store_that_a_recipe_names(tmp_path: Path) -> None:
    recipe = write(tmp_path, signals={"encoding": {"kind": "top_k", "k": 8}})
    assert call("signals", str(recipe)).exit_code == 0
    store = str(tmp_path / "run" / "signals")
    named = write(tmp_path, signals={"store": store}, folder=str(tmp_path / "other"))
    found = {finding.topic: finding.text for finding in check_recipe(named)}
    assert "of kind top_k, recorded earlier" in found["signals"]
    damaged = Path(store).resolve() / "manifest.json"
    damaged.write_text(damaged.read_text().replace('"rows"', '"cows"', 1))
    assert "error" in {finding.level for finding in check_recipe(named)}


def test_an_error_shows_what_where_and_fix() -> None:
    error = StillhouseError("it broke", where="here", fix="mend it")
    assert str(error) == "it broke\n  where: here\n  fix:   mend it"


def test_a_signal_inside_a_finalizer_still_stops_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python ignores exceptions that are raised in `__del__`."""

    class Kills:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def command() -> None:
        Kills()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pass
        raise AssertionError("it went on")

    monkeypatch.setattr(cli, "app", command)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopped.value.code == 143


def _stopped_while_reporting() -> None:
    """torchrun sends SIGTERM while the process reports an error, because another one has ended."""

    def fail() -> None:
        raise DataError("no such file", where="here", fix="there")

    def say(text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sys.stderr.write(text)

    forks.patch(cli, "app", fail)
    forks.patch(exits, "say", say)
    cli.main()


@pytest.mark.run
def test_a_signal_does_not_interrupt_an_errors_message() -> None:
    process = Fork(_stopped_while_reporting)
    _, error = process.communicate()
    assert process.wait() == 1
    assert error.startswith("error: no such file")
    assert "Traceback" not in error


def _hang_up(ignored: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    forks.patch(cli, "app", lambda: os.kill(os.getpid(), signal.SIGHUP))
    cli.main()


@pytest.mark.run
@pytest.mark.parametrize(("ignored", "status"), [(False, 129), (True, 0)])
def test_a_closed_terminal_stops_a_command_unless_it_runs_under_nohup(
    ignored: bool, status: int
) -> None:
    process = Fork(_hang_up, ignored)
    _, error = process.communicate()
    assert process.wait() == status
    assert error.count("stopped.") == (not ignored)


def test_a_signal_that_causes_another_error_is_still_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example, the standard library releases a lock that it has not acquired yet."""

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            threading.Lock().release()

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(stop_signals, "_received", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("stopped.")
