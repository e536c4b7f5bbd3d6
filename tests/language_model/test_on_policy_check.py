"""What `check` reports about `train.on_policy` before the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.errors import DataError
from stillhouse.finding import Finding
from stillhouse.number_format import size
from stillhouse.teachers.load_model import load_tokenizer
from tests import tiny


def findings(folder: Path, on_policy: dict[str, Any], **sections: Any) -> list[Finding]:
    raw = tiny.recipe(folder, **sections)
    return check_recipe({**raw, "train": {**raw["train"], "on_policy": on_policy}}, base=folder)


def of(found: list[Finding], topic: str) -> list[str]:
    return [f"{one.level}: {one.text}" for one in found if one.topic == topic]


def write_prompts(folder: Path, *texts: str) -> dict[str, Any]:
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return {"path": "prompts.jsonl"}


@pytest.mark.run
def test_check_estimates_what_the_student_generates(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "hi", "ho")
    own = {"prompts": prompts, "share": 0.5, "max_tokens": 8, "batch": 3}
    found = findings(tmp_path, own)
    (text,) = of(found, "on-policy")
    # 53 windows in batches of 4 are 14 steps, each with 2 windows of own text. A prompt has 4
    # tokens, so a window of 32 has room for two prompts and their answers of 8 tokens.
    assert "the student generates 56 answers, at most 448 tokens" in text
    # Keys and values x 3 layers x 2 heads x head size 8 x 128 positions x 3 answers x 4 bytes
    assert f"KV cache takes {size(2 * 3 * 2 * 8 * 128 * 3 * 4)}" in text


@pytest.mark.run
def test_weights_in_bfloat16_halve_the_kv_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Products are then in float32, unless the weights need bfloat16.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    raw = tiny.recipe(tmp_path)
    train = {**raw["train"], "precision": "auto", "weights": "bfloat16"}
    own = {"prompts": write_prompts(tmp_path, "hi", "ho"), "max_tokens": 8, "batch": 3}
    found = check_recipe({**raw, "train": {**train, "on_policy": own}}, base=tmp_path)
    (text,) = of(found, "on-policy")
    assert f"KV cache takes {size(2 * 3 * 2 * 8 * 128 * 3 * 2)}" in text


def test_a_weights_folder_that_contains_a_different_model_is_an_error(tmp_path: Path) -> None:
    server = {"base_url": "http://127.0.0.1:9/v1", "model": "student", "weights": "student"}
    tiny.save_model(tmp_path / "student", seed=1)
    found = findings(tmp_path, {"generator": {"kind": "vllm_server", **server}})
    assert [one for one in found if one.level == "error" and "would overwrite" in one.text]


def test_prompts_that_fill_the_context_are_an_error(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "hi", "x" * 40)
    found = findings(tmp_path, {"prompts": prompts})
    assert [one for one in found if one.level == "error" and "1 of 2 prompts fill" in one.text]


def test_prompts_that_leave_little_room_are_a_warning(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "hi", "x" * 20)
    found = of(findings(tmp_path, {"prompts": prompts, "max_tokens": 16}), "on-policy")
    assert found[0].startswith("warning: 1 of 2 prompts leave fewer than max_tokens (16)")


def test_missing_prompts_end_a_run_before_its_first_stage_even_with_a_share_of_0(
    tmp_path: Path,
) -> None:
    raw = tiny.recipe(tmp_path)
    raw["train"] |= {"on_policy": {"share": 0, "prompts": {"path": "later.txt"}}}
    with pytest.raises(DataError, match=r"later\.txt|exist"):
        run(raw, base=tmp_path)
    assert not [*(tmp_path / "run" / "stages").iterdir()]


def test_a_row_without_a_prompt_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n{"question": 3}\n')
    found = findings(tmp_path, {"prompts": {"path": "prompts.jsonl"}})
    assert [one for one in found if one.level == "error" and "prompts.jsonl:2" in one.text]


@pytest.mark.run
def test_a_teacher_with_a_different_chat_template_is_a_warning(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "student", seed=1)
    words = load_tokenizer(tmp_path / "student")
    words.chat_template = tiny.CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>:")
    words.save_pretrained(tmp_path / "student")
    student = {"start": "pretrained", "model": str(tmp_path / "student")}
    raw = tiny.recipe(tmp_path)
    raw["train"]["on_policy"] = {}
    found = check_recipe({**raw, "student": student}, base=tmp_path)
    assert "to the teacher" in of(found, "on-policy")[0]
