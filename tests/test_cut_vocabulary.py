"""Runs whose student has fewer tokens than its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stillhouse
from stillhouse.commands import run as run_cascade
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import RecipeError
from stillhouse.language_model.language_model import LANGUAGE_MODEL
from stillhouse.pipeline.kind import RunResult
from stillhouse.pruning.vocabulary_cut import load_kept_ids
from stillhouse.runfolder import Stage
from tests import tiny
from tests.pruning.test_vocabulary import KINDS

pytestmark = pytest.mark.run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher with 440 embedding rows, at most 432 of which are tokens."""
    words = KINDS["byte-level"]
    end = words.eos_token_id
    tiny.save_model(
        tmp_path / "teacher", vocab_size=440, eos_token_id=end, bos_token_id=words.bos_token_id
    )
    words.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    return tmp_path


def run(raw: dict[str, Any]) -> RunResult:
    result = stillhouse.run(raw)
    assert result is not None
    return result


def stage(result: RunResult, name: str) -> Stage:
    return next(stage for stage in result.stages if stage.name == name)


def test_teacher_and_student_lose_the_same_tokens(
    folder: Path,
) -> None:
    result = run(tiny.recipe(folder, student={"vocabulary": "data"}))
    names = [stage.name for stage in result.stages]
    assert names[:4] == ["data", "vocabulary", "data", "student"]
    stage = next(stage for stage in result.stages if stage.name == "vocabulary")
    assert stage.cost.flops > 0, "the teacher was asked which tokens it expects"
    cut = stage.summary
    assert cut["vocabulary"][0] == 440
    assert cut["vocabulary"][1] < 400
    assert cut["measured_share"] == 1.0
    # The removed tokens had some of the teacher's probability, although no text contains them.
    assert cut["cut_perplexity"] < cut["teacher_perplexity"]

    tokenizer = AutoTokenizer.from_pretrained(result.model)
    student = AutoModelForCausalLM.from_pretrained(result.model)
    assert student.config.vocab_size == cut["vocabulary"][1]
    for text in ("the cat sees the house", "ÄÖ – 漢字\n\tx"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < student.config.vocab_size
    with torch.no_grad():
        assert student(torch.tensor([ids])).logits.isfinite().all()
    assert result.evaluation.result("teacher").fidelity.kl == 0.0
    untrained, trained = (result.evaluation.result(role) for role in ("untrained", "student"))
    assert trained.fidelity.kl < untrained.fidelity.kl


def test_a_second_run_does_not_cut_again(folder: Path) -> None:
    raw = tiny.recipe(folder, student={"vocabulary": 320}, signals={})
    job = LANGUAGE_MODEL.find(parse_recipe(raw), folder)
    steps = [step.name for step in LANGUAGE_MODEL.steps if step.applies(job)]
    result = run(raw)
    assert [stage.name for stage in result.stages] == steps
    assert (result.folder / "signals" / "settings.json").is_file()
    assert all(stage.reused for stage in run(raw).stages)


def test_a_student_that_only_loses_tokens_starts_equal_to_the_cut_teacher(folder: Path) -> None:
    raw = tiny.recipe(folder, student={"vocabulary": 320})
    del raw["student"]["ffn_size"]
    result = run(raw)
    untrained = result.evaluation.result("untrained")
    assert untrained is not None
    assert untrained.fidelity.kl < 1e-6
    assert AutoModelForCausalLM.from_pretrained(result.model).config.vocab_size == 320


def test_a_family_shares_the_cut_teacher(folder: Path) -> None:
    hops = [{"name": "a", "ffn_size": 48}, {"name": "b", "ffn_size": 32}]
    family = tiny.recipe(folder, student={"vocabulary": 320}, cascade={"hops": hops})
    del family["student"]["ffn_size"]
    result = run_cascade(family)
    assert result is not None
    for member in result.members.values():
        assert AutoModelForCausalLM.from_pretrained(member.model).config.vocab_size == 320
    cut = {name: stage(member, "vocabulary") for name, member in result.members.items()}
    assert cut["b"].reused
    family_data = json.loads((result.folder / "family.json").read_text())
    told = family_data["members"]
    whole = AutoModelForCausalLM.from_pretrained(family["teacher"]["model"]).num_parameters()
    lost = (440 - 320) * 32
    assert family_data["cut"]["tokens"] == [440, 320]
    assert family_data["cut"]["parameters"] == [whole, whole - lost]
    assert told[0]["shape"] == {"vocabulary": [440, 320], "ffn_size": [64, 48]}
    assert told[1]["shape"] == {"ffn_size": [48, 32]}
    # The cut is made for the first member and counts toward its time.
    making = [s for s in result.members["a"].stages if s.name in ("data", "vocabulary")]
    making += [stage(result.members["a"], name) for name in ("student", "train")]
    assert told[0]["seconds"] == pytest.approx(sum(s.cost.seconds for s in making))
    hops[1]["vocabulary"] = 300
    with pytest.raises(RecipeError, match="vocabulary"):
        run_cascade(family)


def test_a_family_with_a_cut_vocabulary_is_compared_with_training_from_scratch(
    folder: Path,
) -> None:
    words = AutoTokenizer.from_pretrained(folder / "teacher")
    words.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    words.save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(12)))
    family = tiny.recipe(
        folder,
        student={"vocabulary": 320},
        signals={"encoding": {"kind": "top_k", "k": 64}},
        synthesize={
            "teacher": {"local": {"precision": "float32"}},
            "prompts": {"path": str(folder / "prompts.txt")},
            "sampling": {"max_tokens": 8},
            "filters": {"truncated": False, "refusals": False},
            "out": str(folder / "chats.jsonl"),
        },
        # More text than the members train on, which contains removed tokens.
        cascade={
            "hops": [{"name": "a", "ffn_size": 48}, {"name": "b", "ffn_size": 32}],
            "from_scratch": {"tokens": 6000, "learning_rate": 3e-3},
        },
    )
    family["data"]["context"] = 64
    family["data"]["sources"].append({"kind": "jsonl", "path": str(folder / "chats.jsonl")})
    del family["student"]["ffn_size"]
    result = run_cascade(family)
    assert result is not None
    sizes = {
        AutoModelForCausalLM.from_pretrained(member.model).config.vocab_size
        for member in result.members.values()
    }
    assert sizes == {320}
    assert "trained from random weights with the same teacher" in result.report.read_text()
    again = run_cascade(family)
    assert again is not None
    assert all(s.reused for member in again.members.values() for s in member.stages)


@pytest.mark.parametrize("teacher", ["previous", "both"])
def test_a_member_with_a_cut_vocabulary_learns_from_the_one_before(
    folder: Path, teacher: str
) -> None:
    hops = [{"name": "a", "ffn_size": 48}, {"name": "b", "ffn_size": 32}]
    family = tiny.recipe(
        folder, student={"vocabulary": 320}, cascade={"hops": hops, "teacher": teacher}
    )
    del family["student"]["ffn_size"]
    result = run_cascade(family)
    assert result is not None
    assert AutoModelForCausalLM.from_pretrained(result.members["b"].model).config.vocab_size == 320


def test_a_start_model_and_its_teacher_lose_the_same_tokens(folder: Path) -> None:
    words = KINDS["byte-level"]
    for name, seed, layers in (("start", 1, 2), ("other", 2, 3)):
        tiny.save_model(folder / name, seed, vocab_size=432, num_hidden_layers=layers)
        words.save_pretrained(folder / name)
    raw = tiny.recipe(
        folder,
        student={"vocabulary": 320, "model": str(folder / "start")},
        train={"teachers": ["teacher", str(folder / "other")]},
    )
    del raw["student"]["ffn_size"]
    result = run(raw)
    names = [stage.name for stage in result.stages]
    assert names[:5] == ["data", "vocabulary", "vocabulary", "vocabulary", "data"]
    cut = [load_kept_ids(stage.path / "model") for stage in result.stages[1:4]]
    assert cut[0] is not None
    assert cut == [cut[0]] * 3
    student = AutoModelForCausalLM.from_pretrained(result.model)
    # Nothing else is cut: the student has the layers of its start model.
    assert (student.config.vocab_size, student.config.num_hidden_layers) == (320, 2)


def test_a_start_model_with_another_vocabulary_is_rejected_early(folder: Path) -> None:
    tiny.save_model(folder / "start")
    raw = tiny.recipe(folder, student={"vocabulary": 320, "model": str(folder / "start")})
    with pytest.raises(RecipeError, match="has a different tokenizer"):
        run(raw)
    assert not list(folder.glob("run/stages/*"))


def test_fold_and_renormalize_train_with_different_losses(folder: Path) -> None:
    raw = tiny.recipe(folder, student={"vocabulary": 320, "ffn_size": 32})
    raw["train"] |= {"max_steps": 6}
    losses = {}
    for how in ("renormalize", "fold"):
        raw["student"]["removed_tokens"] = how
        result = run({**raw, "folder": str(folder / how)})
        assert AutoModelForCausalLM.from_pretrained(result.model).config.vocab_size == 320
        metrics = (stage(result, "train").path / "metrics.jsonl").read_text().splitlines()
        losses[how] = [row["forward_kl"] for row in map(json.loads, metrics) if "forward_kl" in row]
        untrained = result.evaluation.result("untrained")
        assert untrained is not None
    assert len(losses["fold"]) == len(losses["renormalize"])
    assert losses["fold"] != losses["renormalize"]
    assert all(loss > 0 for loss in losses["fold"])


def test_training_from_scratch_has_the_teachers_of_the_first_member(folder: Path) -> None:
    """With a fold, the teacher is not cut."""
    family = tiny.recipe(
        folder,
        student={"vocabulary": 320, "removed_tokens": "fold"},
        cascade={"hops": [{"name": "a", "ffn_size": 48}], "from_scratch": {"tokens": 256}},
        train={"max_steps": 2},
    )
    del family["student"]["ffn_size"]
    result = run(family)
    stages = result.folder / "stages"
    teachers = [
        json.loads((next(stages.glob(f"{name}-*")) / "manifest.json").read_text())["depends_on"]
        for name in ("train", "scratch")
    ]
    assert teachers[0]["teachers"] == teachers[1]["teachers"]
    assert (result.folder / "a" / "roots").is_dir()


def test_with_a_fold_additional_teachers_are_not_cut(folder: Path) -> None:
    words = KINDS["byte-level"]
    tiny.save_model(folder / "other", 2, vocab_size=432)
    words.save_pretrained(folder / "other")
    raw = tiny.recipe(
        folder,
        student={"vocabulary": 320, "ffn_size": 32, "removed_tokens": "fold"},
        train={"teachers": ["teacher", str(folder / "other")], "max_steps": 3},
    )
    names = [stage.name for stage in run(raw).stages]
    assert names.count("vocabulary") == 1


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"signals": {"encoding": {"kind": "top_k", "k": 8}}}, "signals are stored"),
        ({"objective": {"terms": [{}, {"kind": "hidden_states"}]}}, "compare positions"),
    ],
)
def test_a_fold_is_rejected_where_the_cut_teacher_is_needed(
    folder: Path, section: dict[str, Any], reason: str
) -> None:
    student = {"vocabulary": 320, "ffn_size": 32, "removed_tokens": "fold"}
    with pytest.raises(RecipeError, match=reason):
        run(tiny.recipe(folder, student=student, **section))
    assert not list(folder.glob("run/stages/*"))
