"""Problems that `check` reports also stop `run` before its first stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from stillhouse.check import check_recipe
from stillhouse.commands import agree_to_spend, run
from stillhouse.errors import StillhouseError
from stillhouse.family.members import first_member, planned_models
from stillhouse.language_model import run_check
from stillhouse.language_model.job import find_models
from stillhouse.language_model.package_check import require_disk
from stillhouse.language_model.run_check import one_student
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import config_size
from tests import tiny
from tests.data.toys import write_jsonl

pytestmark = pytest.mark.run


def synthesis(folder: Path, **changes: Any) -> dict[str, Any]:
    raw = tiny.recipe(folder)
    (folder / "prompts.txt").write_text("Say 1\nSay 2\n")
    raw["synthesize"] = {
        "teacher": {"local": {}},
        "prompts": {"path": str(folder / "prompts.txt")},
        "sampling": {"max_tokens": 4},
        "out": str(folder / "out.jsonl"),
        **changes,
    }
    source = {"kind": "jsonl", "path": raw["synthesize"]["out"]}
    raw["data"]["sources"] = [source, *raw["data"]["sources"]]
    return raw


def error_of_check_and_run(raw: dict[str, Any], folder: Path) -> str:
    """The first error of `check`. Asserts that `run` fails too, before any stage."""
    found = [one for one in check_recipe(raw) if one.level == "error"]
    assert found
    assert found[0].fix
    with pytest.raises(StillhouseError):
        run(raw)
    stages = folder / "run" / "stages"
    assert not stages.exists() or not [*stages.iterdir()]
    return f"{found[0].topic}: {found[0].text}"


def test_a_tracker_that_is_missing_or_unknown_is_an_error(tmp_path: Path) -> None:
    text = error_of_check_and_run(
        tiny.recipe(tmp_path, train={"report_to": ["comet_ml"]}), tmp_path
    )
    assert text == "extras: comet_ml is not installed"
    text = error_of_check_and_run(tiny.recipe(tmp_path, train={"report_to": ["weights"]}), tmp_path)
    assert "weights is not a tracker" in text


def test_an_override_that_the_architecture_does_not_allow_is_an_error_in_the_recipe(
    tmp_path: Path,
) -> None:
    raw = tiny.recipe(tmp_path)
    raw["student"] = {"start": "random", "overrides": {"hidden_act": "no-such-act"}}
    text = error_of_check_and_run(raw, tmp_path)
    assert "the student's configuration is invalid" in text
    assert "no-such-act" in text
    raw["student"]["overrides"] = {"vocab_size": 5}
    text = error_of_check_and_run(raw, tmp_path)
    assert "vocab_size is 5, but the student's tokenizer has 260 tokens" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "the list of tokens to keep cannot be read"),
        ("no-such-token\n", "tokens that the teacher does not have"),
        ("a\n", "the list lacks required tokens"),
    ],
    ids=["missing", "unknown", "incomplete"],
)
def test_a_list_of_tokens_that_cannot_be_used_is_an_error(
    tmp_path: Path, content: str | None, expected: str
) -> None:
    raw = tiny.recipe(tmp_path)
    raw["student"] = {"start": "pruned", "vocabulary": {"path": str(tmp_path / "kept.txt")}}
    if content is not None:
        (tmp_path / "kept.txt").write_text(content)
    assert expected in error_of_check_and_run(raw, tmp_path)


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ({"kind": "attention_relations", "heads": 2}, "the attention in GPTNeoXLayer"),
        ({"divergence": "forward_kl", "layers": [1]}, "the final norm in GPTNeoXForCausalLM"),
    ],
    ids=["attention", "logits"],
)
def test_a_term_that_does_not_find_its_part_of_the_model_is_an_error(
    tmp_path: Path, term: dict[str, Any], expected: str
) -> None:
    raw = tiny.recipe(tmp_path, objective={"terms": [{"divergence": "forward_kl"}, term]})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tokens = {"vocab_size": len(tiny.tokenizer()), "bos_token_id": None, "eos_token_id": None}
    config = GPTNeoXConfig(num_attention_heads=4, max_position_embeddings=128, **sizes, **tokens)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "teacher")
    raw["student"] = {"start": "random"}
    assert expected in error_of_check_and_run(raw, tmp_path)


def test_different_chat_templates_are_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tiny.recipe(tmp_path)
    words = tiny.tokenizer()
    tiny.save_model(tmp_path / "student", seed=1)
    words.chat_template = "{{ messages[0]['content'] }}"
    words.save_pretrained(tmp_path / "student")
    raw["student"] = {"start": "pretrained", "model": str(tmp_path / "student")}
    raw["train"] |= {"max_steps": 1}
    expected = "teacher and student have different chat templates"
    assert [one.topic for one in check_recipe(raw) if expected in one.text] == ["vocabulary"]
    assert agree_to_spend(raw)
    run(raw)
    assert capsys.readouterr().err.count(expected) == 1


def test_too_little_disk_space_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny.recipe(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    assert error_of_check_and_run(raw, tmp_path).startswith("disk: about")


def test_all_members_of_a_family_need_disk_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "ffn_size": 40}]
    raw = {**tiny.recipe(tmp_path, cascade={"hops": hops}), "student": {"start": "pruned"}}
    recipe = tiny.parsed(raw)
    job = find_models(first_member(recipe), tmp_path)
    monkeypatch.setattr("stillhouse.language_model.package_check.size", "{:.0f} bytes".format)
    students = planned_models(recipe, job)

    def needed(*numbers: int) -> int:
        (found,) = require_disk(job, [students[number] for number in numbers])
        return int(found.text.split()[1])

    # A finished training leaves no checkpoints but three copies of the student: untrained,
    # trained, and exported.
    wide, narrow = (config_size(models.student).parameters for models in students)
    checkpoints = 12 * (recipe.train.keep_checkpoints + 1)
    text = needed(0) - (12 + checkpoints) * wide
    assert needed(0, 1) == text + 12 * wide + (12 + checkpoints) * narrow
    assert needed(1) < needed(0) < needed(0, 1)


def test_windows_of_a_large_text_need_disk_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.recipe(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    (tmp_path / "text.txt").write_text(tiny.text(1000) + "\n" + ("word " * 20 + "\n") * 50_000)
    raw["data"]["train_tokens"] = None
    assert "windows" in error_of_check_and_run(raw, tmp_path)
    raw["data"]["train_tokens"] = 100_000
    assert "error" not in {one.level for one in check_recipe(raw)}
    raw["data"]["train_tokens"] = None
    raw["data"]["sources"][0]["tokens"] = 100_000
    assert "error" not in {one.level for one in check_recipe(raw)}


def test_rows_beyond_a_limit_need_no_disk_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.recipe(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    (tmp_path / "text.txt").write_text(tiny.text(1000) + "\n" + ("word " * 20 + "\n") * 50_000)
    raw["data"]["train_tokens"] = None
    raw["data"]["sources"][0] |= {"documents": "line", "limit": 2000}
    assert [one for one in check_recipe(raw) if one.level == "error"] == []


def test_a_dataset_has_at_least_as_many_tokens_as_its_sample(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", [{"text": tiny.text(30 + n)} for n in range(1000)])
    raw["data"]["sources"] = [{"kind": "hub", "dataset": str(tmp_path / "set")}]
    raw["data"] |= {"train_tokens": 2_000_000, "heldout_tokens": 1000}
    (text,) = [one.text for one in check_recipe(raw) if one.topic == "data"]
    assert text.startswith("about 2,001,000 tokens; ")
    raw["data"]["train_tokens"] = None
    (text,) = [one.text for one in check_recipe(raw) if one.topic == "data"]
    assert text.startswith("at least ")


def test_text_of_unknown_size_needs_disk_space_for_train_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = {"kind": "hub", "dataset": "org/name"}
    raw = tiny.recipe(tmp_path, data={"sources": [hub], "train_tokens": 10**9})
    job = find_models(tiny.parsed(raw), tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    (found,) = require_disk(job, one_student(job))
    assert found.level == "error"


def test_text_that_is_yet_to_be_generated_is_part_of_the_estimate(tmp_path: Path) -> None:
    """Two answers of at most 300 tokens each, in addition to the other source."""
    raw = synthesis(tmp_path, sampling={"max_tokens": 300})
    raw["data"]["sources"][1]["tokens"] = 5000
    (tmp_path / "text.txt").write_text(tiny.text(4000))
    found = {one.topic: one for one in check_recipe(raw)}
    assert found["data"].text.startswith("about 5,600 tokens")
    assert "training" in found


def test_the_tokens_of_a_limited_source_are_estimated(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    (tmp_path / "text.txt").write_text(tiny.text(4000))
    raw["data"]["sources"][0]["tokens"] = 5000
    (found,) = [one.text for one in check_recipe(raw) if one.topic == "data"]
    assert found.startswith("about 5,000 tokens")


def test_a_signal_store_needs_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny.recipe(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    assert "error" not in {one.level for one in check_recipe(raw)}
    (tmp_path / "text.txt").write_text(tiny.text(40_000))
    raw["signals"] = {"encoding": {"kind": "hidden"}}
    raw["data"]["train_tokens"] = 1_000_000
    assert "signals" in error_of_check_and_run(raw, tmp_path)


def test_a_missing_api_key_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    api = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "SOME_KEY"}
    text = error_of_check_and_run(synthesis(tmp_path, teacher={"api": api}), tmp_path)
    assert "SOME_KEY is not set" in text
    server = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "SOME_KEY"}
    signals = {"server": server, "encoding": {"kind": "top_k", "k": 5}}
    text = error_of_check_and_run(tiny.recipe(tmp_path, signals=signals), tmp_path)
    assert "SOME_KEY is not set" in text


def test_a_missing_judge_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"kind": "judge", "teacher": {"local": {"model": str(tmp_path / "nowhere")}}}
    raw = synthesis(tmp_path, filters={"best_of": judge})
    raw["synthesize"]["prompts"]["samples"] = 2
    assert "there is no model" in error_of_check_and_run(raw, tmp_path)


@pytest.mark.parametrize("out", ["prompts.txt", "folder"])
def test_synthesis_to_an_existing_file_or_folder_is_an_error(tmp_path: Path, out: str) -> None:
    (tmp_path / "folder").mkdir()
    raw = synthesis(tmp_path, out=str(tmp_path / out))
    error_of_check_and_run(raw, tmp_path)
    assert (tmp_path / "prompts.txt").read_text() == "Say 1\nSay 2\n"


FINE = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LONG = {"messages": [{"role": "user", "content": "a " * 400}, FINE["messages"][1]]}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{"role": "user"}]}, "has no `content`"),
        (LONG, "more than the context of"),
        ({"text": "<|user|>a<|assistant|>b<|end|>"}, "begins or ends with"),
    ],
)
@pytest.mark.parametrize("part", ["sources", "heldout_sources"])
def test_other_text_that_cannot_be_learned_is_found_before_the_teacher_is_queried(
    tmp_path: Path, row: dict[str, Any], what: str, part: str
) -> None:
    """All rows are checked; the bad one is the 301st."""
    raw = synthesis(tmp_path)
    lines = [json.dumps(FINE)] * 300 + [json.dumps(row)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    raw["data"].setdefault(part, []).append({"kind": "jsonl", "path": str(tmp_path / "chat.jsonl")})
    assert what in error_of_check_and_run(raw, tmp_path)
    assert not (tmp_path / "answers.sqlite").exists()


def test_control_tokens_are_an_error_unless_the_recipe_allows_them(tmp_path: Path) -> None:
    raw = synthesis(tmp_path)
    row = {"prompt": "<|user|>a<|assistant|>", "completion": "b<|end|>"}
    (tmp_path / "rendered.jsonl").write_text(json.dumps(row))
    raw["data"]["sources"].append({"kind": "jsonl", "path": str(tmp_path / "rendered.jsonl")})
    assert "begins or ends with" in error_of_check_and_run(raw, tmp_path)
    raw["data"]["control_tokens"] = "tokens"
    assert "error" not in {one.level for one in check_recipe(raw)}


def test_a_format_that_the_tokenizer_does_not_fit_is_an_error(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path, export={"formats": ["gguf-f16"]})
    assert "merges" in error_of_check_and_run(raw, tmp_path)


def test_an_unknown_language_in_a_filter_is_an_error(tmp_path: Path) -> None:
    assert "zz" in error_of_check_and_run(
        synthesis(tmp_path, filters={"languages": ["zz"]}), tmp_path
    )


def test_a_training_that_does_not_fit_in_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Machine("cpu", memory=1e8, rate=1e9)
    monkeypatch.setattr(run_check, "this_machine", lambda *_, **__: small)
    text = error_of_check_and_run(tiny.recipe(tmp_path), tmp_path)
    assert text.startswith("memory: student needs about")
    assert "too little even with a margin of 10%" in text
