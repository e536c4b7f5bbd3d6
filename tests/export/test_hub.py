"""What is uploaded, where, and with which token; a recorder stands in for the Hub."""

from __future__ import annotations

import html
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from huggingface_hub.errors import HFValidationError

from stillhouse.errors import RunError
from stillhouse.export import push as hub
from stillhouse.export.export_config import PushRecipe
from stillhouse.export.push import push

SECRET = "hf_secret/of+this&test"


class Recorder:
    """Stands in for `HfApi` and records its calls; every upload raises `fails`."""

    calls: list[tuple[str, dict[str, Any]]]
    fails: Exception | None = None

    def __init__(self, *, token: str) -> None:
        self.calls.append(("token", {"token": token}))

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create", {"repo": repo, **options}))

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        if self.fails is not None:
            raise self.fails
        self.calls.append(("upload", options))
        return SimpleNamespace(commit_url=f"https://hub/commit/{len(self.calls)}")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(hub, "HfApi", Recorder)
    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return Recorder


def test_the_first_format_is_the_repositorys_root_and_others_are_folders(
    recorder: type[Recorder], tmp_path: Path
) -> None:
    folders = {"safetensors": tmp_path / "model", "gguf-q8_0": tmp_path / "gguf-q8_0"}
    done = push(PushRecipe(repo="me/small"), folders, "demo")
    assert recorder.calls[0] == ("token", {"token": SECRET})
    assert recorder.calls[1] == ("create", {"repo": "me/small", "private": True, "exist_ok": True})
    uploads = [options for what, options in recorder.calls if what == "upload"]
    assert [(u["folder_path"], u["path_in_repo"]) for u in uploads] == [
        (tmp_path / "model", None),
        (tmp_path / "gguf-q8_0", "gguf-q8_0"),
    ]
    assert list(done) == ["safetensors", "gguf-q8_0"]
    assert SECRET not in str(done)


def test_token_env_names_the_variable_that_holds_the_token(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "other")
    push(PushRecipe(repo="me/small", token_env="MY_TOKEN"), {}, "demo")
    assert recorder.calls[0] == ("token", {"token": "other"})


def test_a_missing_token_is_an_error_before_the_hub_is_called(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="no token") as caught:
        push(PushRecipe(repo="me/small"), {}, "demo")
    assert "HF_TOKEN" in str(caught.value.fix)
    assert recorder.calls == []


@pytest.mark.parametrize("spelled", [SECRET, quote(SECRET, safe=""), html.escape(SECRET)])
def test_hub_errors_are_reported_without_the_token(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spelled: str
) -> None:
    monkeypatch.setattr(recorder, "fails", HFValidationError(f"{spelled} may not write"))
    with pytest.raises(RunError, match="may not write") as caught:
        push(PushRecipe(repo="me/small"), {"safetensors": tmp_path}, "demo")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("[Errno 111] Connection refused"), "Connection refused"),
        (
            ValueError('Invalid metadata in README.md.\n- Error: "license" is not'),
            '"license" is not',
        ),
    ],
)
def test_errors_of_other_classes_than_the_hubs_are_reported(
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    shown: str,
) -> None:
    monkeypatch.setattr(recorder, "fails", error)
    with pytest.raises(RunError, match="upload to the Hub failed") as caught:
        push(PushRecipe(repo="me/small"), {"safetensors": tmp_path}, "demo")
    assert shown in str(caught.value)
