"""Recipes whose `train.teachers` have a different tokenizer than the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.errors import ModelError, SignalError
from tests import chat_toys, tiny
from tests.teachers.tokenizer_toys import byte_level, gemma, sentencepiece

pytestmark = pytest.mark.run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, `teacher` and `other`, whose tokenizers have 301 and 331 tokens."""
    save(tmp_path / "teacher", byte_level(300))
    save(tmp_path / "other", byte_level(330))
    (tmp_path / "text.txt").write_text(tiny.text(800))
    return tmp_path


def save(folder: Path, words: Any) -> None:
    tiny.llama(seed=3, vocab_size=len(words)).save_pretrained(folder)
    words.save_pretrained(folder)


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    raw = tiny.recipe(folder, **sections)
    raw["train"] |= {"teachers": [str(folder / "other"), "teacher"], "max_steps": 4}
    return raw


def test_teachers_with_different_tokenizers_can_be_combined(folder: Path) -> None:
    result = run(recipe(folder))
    (row, *_) = result.evaluation.models
    assert row.role == "teacher"
    (metrics,) = (folder / "run").glob("stages/train-*/metrics.jsonl")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [step["forward_kl"] for step in steps if "forward_kl" in step]
    assert losses
    assert min(losses) > 0


def test_check_reports_what_the_tokenizers_share(folder: Path) -> None:
    found = [one for one in check_recipe(recipe(folder)) if one.topic == "tokenizer"]
    assert [one.level for one in found] == ["ok"]
    assert "300 strings are tokens of both" in found[0].text
    assert "of the supervised tokens start where one of its tokens does" in found[0].text


def test_a_cut_vocabulary_does_not_cut_a_teacher_with_a_different_tokenizer(folder: Path) -> None:
    raw = recipe(folder, student={"vocabulary": 280, "ffn_size": 32})
    raw["train"]["teachers"] = [str(folder / "other")]
    names = [stage.name for stage in run(raw).stages]
    assert names.count("vocabulary") == 1


def test_terms_on_hidden_states_are_rejected_before_any_stage(folder: Path) -> None:
    terms = [{"kind": "logits"}, {"kind": "hidden_states"}]
    with pytest.raises(SignalError, match="a different tokenizer"):
        run(recipe(folder, objective={"terms": terms}))
    assert not list(folder.glob("run/stages/*"))


@pytest.mark.parametrize("template", [True, False])
def test_chats_are_rendered_with_the_teachers_template_if_it_has_one(
    tmp_path: Path, template: bool
) -> None:
    words = chat_toys.tokenizer()
    chat_toys.save_model(tmp_path / "teacher", words)
    save(tmp_path / "other", gemma() if template else sentencepiece(120))
    chats = [{"messages": chat_toys.chat(f"say {n}", f"{n}")} for n in range(200)]
    path = chat_toys.write_jsonl(tmp_path / "chats.jsonl", chats)
    raw = recipe(tmp_path, data={"sources": [{"kind": "jsonl", "path": str(path)}], "context": 64})
    (found,) = [one for one in check_recipe(raw) if one.topic == "tokenizer"]
    if not template:
        assert found.level == "error"
        assert "no token for <|im_start|>" in found.text
        return
    assert found.level == "ok"
    assert "100.0% of the supervised tokens" in found.text
    assert run(raw).evaluation.models


def test_a_teacher_whose_tokenizer_changes_text_is_rejected(folder: Path) -> None:
    path = folder / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="changes text"):
        run(recipe(folder))
    assert not list(folder.glob("run/stages/*"))
