"""Recipes whose `teacher` has a different tokenizer than the student, from `check` to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stillhouse as sh
from stillhouse.check import check_recipe
from stillhouse.commands import evaluate_model, run
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.data.batches import in_order
from stillhouse.data.data import Data
from stillhouse.data.tokenize_rows import TokenRow
from stillhouse.data.windows import open_windows
from stillhouse.errors import DataError, ModelError, RecipeError, SignalError
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.language_model.alignment_check import check_alignment
from stillhouse.language_model.job import find_models
from stillhouse.signals.lm_head import log_probabilities
from stillhouse.students.student import Student
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.aligned_text import whole_text
from stillhouse.teachers.backbone import hidden_states, lm_head
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.roots_file import load_roots
from stillhouse.teachers.teacher import Teacher
from tests import chat_toys, tiny
from tests.answering import toys as answers
from tests.teachers.tokenizer_toys import byte_level, gemma, sentencepiece

pytestmark = pytest.mark.run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher with a SentencePiece tokenizer, and a student with byte-level BPE."""
    save(tmp_path / "teacher", sentencepiece(120))
    save(tmp_path / "student", byte_level(300), num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(tiny.text(800))
    return tmp_path


def save(folder: Path, words: Any, **changes: Any) -> None:
    tiny.llama(seed=3, vocab_size=len(words), **changes).save_pretrained(folder)
    words.save_pretrained(folder)


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    student = {"start": "pretrained", "model": str(folder / "student")}
    raw = {**tiny.recipe(folder), "student": student}
    raw["train"] |= {"max_steps": 4}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return raw


def training_steps(folder: Path) -> list[dict[str, Any]]:
    (metrics,) = (folder / "run").glob("stages/train-*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    found = [step["forward_kl"] for step in training_steps(folder) if "forward_kl" in step]
    assert found, "no step has a forward KL"
    return found


def test_a_complete_run_compares_models_on_shared_roots(folder: Path) -> None:
    result = run(recipe(folder))
    teacher, student = (result.evaluation.result(role) for role in ("teacher", "student"))
    assert student.fidelity.compared == teacher.fidelity.compared < student.fidelity.tokens
    assert 0 < student.fidelity.kl < 10
    names = [row.name for row in metrics_of(result.evaluation).rows]
    assert "KL to the teacher, shared roots (nats/token)" in names
    assert "bits per byte" in result.report.read_text()
    assert min(losses(folder)) > 0


def test_evaluation_agrees_with_a_slow_reference(folder: Path) -> None:
    """KL, top-1 agreement, and the teacher's bits per byte, one position at a time."""
    raw = recipe(folder, train={"max_steps": 1})
    result = run(raw)
    (heldout,) = (folder / "run").glob("stages/data-*/heldout")
    models, words = {}, {}
    for name, path in (("teacher", folder / "teacher"), ("student", result.model)):
        models[name] = load_model(path, dtype=torch.float32)
        words[name] = load_tokenizer(path)
    aligner = TokenAligner(words["student"], words["teacher"])
    (place,) = (folder / "run").glob("stages/roots-*/*/roots.safetensors")
    roots = load_roots(place.parent, aligner)
    kl, agreed, bits, size = [], 0, 0.0, 0
    for batch in in_order(open_windows(heldout), 1):
        text = whole_text(aligner, batch)
        logs = {}
        for name, one in (("student", batch), ("teacher", text.batch)):
            hidden = hidden_states(models[name], one["input_ids"], one["position_ids"])[0]
            logs[name] = log_probabilities(lm_head(models[name]), hidden).double()
        labels = text.batch["labels"][0]
        for m in (labels >= 0).nonzero()[:, 0].tolist():
            bits -= float(logs["teacher"][m - 1, labels[m]]) / torch.log(torch.tensor(2.0)).item()
            size += len(aligner.teacher.strings.get(int(labels[m]), b""))
        (window,) = aligner.align(
            *(batch[n].numpy() for n in ("input_ids", "position_ids", "labels"))
        )
        predicted = (batch["labels"][0, 1:] >= 0).nonzero()[:, 0] + 1
        for t in predicted[text.covered_N].tolist():
            sums = []
            for name, row, roots_X in (
                ("teacher", int(window.begins_L[t]) - 1, roots.teacher_W),
                ("student", t - 1, roots.student_V),
            ):
                p = logs[name][row].exp()[: len(roots_X)]
                zero = torch.zeros(roots.count, dtype=torch.float64)
                sums.append(zero.index_add(0, torch.from_numpy(roots_X), p))
            p, q = sums
            kl.append(float((p * (p.log() - q.log())).nan_to_num().sum()))
            agreed += int(p.argmax() == q.argmax())
    found = result.evaluation.result("student").fidelity
    teacher = result.evaluation.result("teacher").fidelity
    assert found.compared == len(kl)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=2e-3)  # exports are bfloat16
    assert found.top1_agreement == pytest.approx(agreed / len(kl), abs=0.02)
    assert teacher.bits_per_byte == pytest.approx(bits / size, rel=1e-4)


def test_check_reports_how_the_models_are_compared(folder: Path) -> None:
    found = check_recipe(recipe(folder))
    assert not [one for one in found if one.level == "error"]
    texts = {one.topic: one.text for one in found}
    assert "the teacher has a different tokenizer" in texts["vocabulary"]
    assert "the teacher scores live; with `signals: {}`" in texts["signals"]
    assert "strings are tokens of both" in texts["tokenizer"]


def test_roots_are_computed_once_and_summarized_in_the_run_folder(folder: Path) -> None:
    run(recipe(folder))
    (place,) = [path for path in (folder / "run" / "roots").iterdir() if path.is_dir()]
    summary = json.loads((place / "roots.json").read_text())
    assert summary["teacher"]["tokenizer"] == str(folder / "teacher")
    assert summary["strings_that_are_tokens_of_both"] > 200
    again = run(recipe(folder, train={"learning_rate": 1e-3}))
    assert next(stage for stage in again.stages if stage.name == "roots").reused


def test_tokenizer_same_rejects_a_different_tokenizer(folder: Path) -> None:
    with pytest.raises(ModelError, match="different vocabularies"):
        run(recipe(folder, teacher={"tokenizer": "same"}))


def test_a_pruned_student_keeps_the_tokenizer_of_its_start_model(folder: Path) -> None:
    student = {"start": "pruned", "model": str(folder / "student"), "ffn_size": 32}
    raw = {**recipe(folder), "student": {**student, "calibration_tokens": 512}}
    result = run(raw)
    assert len(load_tokenizer(result.model)) == 301
    assert result.evaluation.result("student").fidelity.compared


def test_a_random_student_can_have_its_own_tokenizer(folder: Path) -> None:
    words = folder / "words"
    byte_level(280).save_pretrained(words)
    raw = recipe(folder)
    raw["student"] = {"start": "random", "tokenizer": str(words)}
    result = run(raw)
    student = load_model(result.model, dtype=torch.float32)
    assert student.config.vocab_size == 281
    assert result.evaluation.result("student").fidelity.compared


def test_a_cut_vocabulary_is_rejected(folder: Path) -> None:
    raw = recipe(folder)
    raw["student"] = {"start": "pruned", "model": str(folder / "student"), "vocabulary": 280}
    with pytest.raises(RecipeError, match="has a different tokenizer"):
        run(raw)


def test_a_store_of_nearly_all_roots_trains_like_the_live_teacher(folder: Path) -> None:
    live = run(recipe(folder))
    expected = losses(folder)
    encoding = {"kind": "top_k", "k": 254}
    stored = run(
        {**recipe(folder, signals={"encoding": encoding}), "folder": str(folder / "stored")}
    )
    (folder / "run").rename(folder / "live")
    (folder / "stored").rename(folder / "run")
    assert losses(folder) == pytest.approx(expected, rel=5e-2)
    kl = [one.evaluation.result("student").fidelity.kl for one in (live, stored)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-2)


def test_the_default_signals_are_recorded_and_read_again(folder: Path) -> None:
    """The store serves the same text again; the teacher scores text that it lacks live."""
    raw = recipe(folder, signals={}, train={"evaluate_every": 2})
    texts = [one.text for one in check_recipe(raw) if one.topic == "signals"]
    assert "the teacher scores the text once" in texts[0]
    result = run(raw)
    (signals,) = [stage for stage in result.stages if stage.name == "signals"]
    assert signals.summary["bytes"] == pytest.approx(36, rel=0.5)
    store = str(folder / "run" / "signals")
    raw |= {"signals": {"store": store}, "folder": str(folder / "second")}
    again = run(raw)
    found = [one.evaluation.result("student").fidelity.kl for one in (result, again)]
    assert found[0] == found[1]
    (folder / "text.txt").write_text(tiny.text(800, seed=1))
    raw |= {"signals": {"store": store, "missing": "live"}, "folder": str(folder / "third")}
    assert run(raw).evaluation.result("student").fidelity.compared


def test_a_term_on_chunks_needs_a_live_teacher_with_a_different_tokenizer(
    folder: Path,
) -> None:
    chunks = {"terms": [{"divergence": "forward_kl"}, {"kind": "chunks"}]}
    same = {**recipe(folder, objective=chunks), "student": {"start": "random"}}
    for raw in (recipe(folder, objective=chunks, signals={}), same):
        with pytest.raises(SignalError, match="two tokenizers split differently"):
            run(raw)
        assert not list((folder / "run").glob("stages/*"))
    assert run(recipe(folder, objective=chunks)).evaluation.result("student").fidelity.compared


def test_own_text_is_scored_by_the_teacher_even_if_signals_are_stored(tmp_path: Path) -> None:
    raw = recipe(tmp_path, data=chats_in(tmp_path), signals={"encoding": {"kind": "top_k"}})
    raw["train"] |= {"on_policy": {"share": 0.5, "max_tokens": 6, "window": 2}}
    run(raw)
    assert any(step.get("own_forward_kl", 0) > 0 for step in training_steps(tmp_path))


@pytest.mark.parametrize("kind", ["hidden", "frozen_head"])
def test_signals_that_cannot_be_stored_over_roots_are_rejected(folder: Path, kind: str) -> None:
    raw = recipe(folder, signals={"encoding": {"kind": kind}}, train={"freeze_head": True})
    with pytest.raises(SignalError, match=f"signals of kind {kind} cannot be stored"):
        run(raw)
    assert not list((folder / "run").glob("stages/*"))


def test_chats_are_rendered_by_each_models_own_template(tmp_path: Path) -> None:
    raw = recipe(tmp_path, data=chats_in(tmp_path))
    found = check_recipe(raw)
    assert not [one for one in found if one.level in ("error", "warning") and "token" in one.topic]
    result = run(raw)
    assert result.evaluation.result("student").fidelity.compared
    assert all(one.answers["teacher"] is not None for one in result.evaluation.generations)


def test_evaluate_compares_another_model_with_the_teacher(folder: Path) -> None:
    raw = recipe(folder)
    run(raw)
    file = folder / "recipe.json"
    file.write_text(json.dumps(raw))
    found = evaluate_model(file, model=str(folder / "student"))
    assert found.result("student").fidelity.compared


def chats_in(folder: Path, count: int = 200) -> dict[str, Any]:
    """Save models with different chat templates, and chats; the data section for them."""
    chat_toys.save_model(folder / "student", chat_toys.tokenizer())
    save(folder / "teacher", gemma())
    chats = [{"messages": chat_toys.chat(f"say {n}", f"{n}")} for n in range(count)]
    path = chat_toys.write_jsonl(folder / "chats.jsonl", chats)
    return {"sources": [{"kind": "jsonl", "path": str(path)}], "context": 64}


def test_the_students_own_text_is_scored_by_the_teacher_in_its_tokens(tmp_path: Path) -> None:
    """Even if a random student generates special tokens inside its answers."""
    own = {"share": 0.5, "max_tokens": 6, "window": 2}
    evaluate = {"own_text": {"answers": 3, "max_tokens": 6}}
    raw = recipe(tmp_path, data=chats_in(tmp_path), evaluate=evaluate)
    raw["train"] |= {"on_policy": own}
    result = run(raw)
    found = result.evaluation.result("student").own_text
    assert found.forward_kl > 0
    assert found.teacher_logprob < 0
    assert result.evaluation.result("teacher").own_text is None
    assert any(step.get("own_forward_kl", 0) > 0 for step in training_steps(tmp_path))


def test_quantization_aware_training_learns_from_the_teacher(folder: Path) -> None:
    result = run(recipe(folder, quantize={"kind": "int8", "qat": {"tokens": 200}}))
    assert result.evaluation.result("quantized_trained").fidelity.compared


def test_members_of_a_family_are_compared_on_shared_roots(folder: Path) -> None:
    student = {"start": "pruned", "model": str(folder / "student"), "calibration_tokens": 512}
    hops = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "ffn_size": 32}]
    raw = {**recipe(folder), "student": student, "cascade": {"hops": hops}}
    raw["export"] = {"formats": ["safetensors"]}
    result = run(raw)
    assert [one.student.fidelity.compared is None for one in result.evaluation.members] == [
        False
    ] * 2
    names = [row.name for row in metrics_of(result.evaluation).rows]
    assert "Top-1 agreement, shared roots" in names


def test_a_chat_that_the_teacher_cannot_render_is_an_error_that_names_its_row(
    tmp_path: Path,
) -> None:
    """The teacher's template accepts no system message."""
    chat_toys.save_model(tmp_path / "student", chat_toys.tokenizer())
    no_system = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<turn>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    save(tmp_path / "teacher", gemma(no_system))
    chats = [{"messages": chat_toys.chat(f"say {n}", f"{n}")} for n in range(200)]
    chats[7]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    path = chat_toys.write_jsonl(tmp_path / "chats.jsonl", chats)
    source = {"kind": "jsonl", "path": str(path)}
    raw = recipe(tmp_path, data={"sources": [source], "context": 64, "train_tokens": 100_000})
    (found,) = [one for one in check_recipe(raw) if one.level == "error"]
    assert "chats.jsonl:8" in found.text
    with pytest.raises(DataError, match="Be brief"):
        run(raw)
    assert not list((tmp_path / "run").glob("stages/train-*"))


def test_check_warns_of_text_that_the_teachers_tokenizer_changes(folder: Path) -> None:
    """NFC joins a letter and its accent, which the general test of the tokenizer lacks."""
    path = folder / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, content["normalizer"]],
    }
    path.write_text(json.dumps(content))
    lines = tiny.text(800).splitlines()
    lines[5] = "re\u0301sume\u0301 of a cat"
    (folder / "text.txt").write_text("\n".join(lines))
    found = [one for one in check_recipe(recipe(folder)) if one.topic == "tokenizer"]
    assert [one.level for one in found] == ["ok", "warning"]
    assert "changes 1 of 400 rows, such as" in found[1].text
    assert "text.txt:6" in found[1].text
    assert run(recipe(folder)).evaluation.result("student").fidelity.compared


def test_check_names_a_row_without_a_shared_token_boundary(folder: Path) -> None:
    """Only the student's second token of " friend" is learned; the teacher has a single token."""
    save(folder / "teacher", byte_level(330))
    words = load_tokenizer(folder / "student")
    whole = words("my friend", add_special_tokens=False)["input_ids"]
    assert len(whole) > len(byte_level(330)("my friend")["input_ids"])
    ids = np.array(whole, dtype=np.int32)
    inside = TokenRow(ids, np.arange(len(ids)) == len(ids) - 1, splittable=True)
    row = TokenRow(ids, np.ones(len(ids), dtype=bool), splittable=True)
    job = find_models(tiny.parsed(recipe(folder)), folder)
    found = list(check_alignment(job, [("rows.jsonl:1", row), ("rows.jsonl:2", inside)]))
    assert found[1].level == "warning"
    assert "1 of 2 rows, such as rows.jsonl:2" in found[1].text
    (alone,) = check_alignment(job, [("rows.jsonl:2", inside)])
    assert alone.level == "error"


def test_an_answering_student_learns_through_shared_roots(tmp_path: Path) -> None:
    raw = answers.recipe(tmp_path, "generate")
    special = tuple(tiny.SPECIAL[1:])
    save(tmp_path / "student", byte_level(300, special=special, chat_template=tiny.CHAT_TEMPLATE))
    raw["student"] = {"start": "pretrained", "model": str(tmp_path / "student")}
    result = run(parse_recipe(answers.clean(raw)))
    stages = {stage.name: stage for stage in result.stages}
    assert stages["roots"].summary
    assert max(losses(tmp_path)) > 0


def test_the_python_api_evaluates_against_an_aligned_teacher(folder: Path) -> None:
    student = Student.load(folder / "student")
    teacher = Teacher.load(folder / "teacher", dtype="float32").aligned(student.tokenizer)
    data = Data.build(
        tiny.text(200).splitlines(), student.tokenizer, context=32, heldout_tokens=512
    )
    found = sh.evaluate(student, teacher, data, own_text=2, max_new_tokens=4)
    assert found.result("student").fidelity.compared
    assert "shared roots" in repr(found)
