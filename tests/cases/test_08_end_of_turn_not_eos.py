"""The token that the chat template writes after an answer ends answers even if it is not EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, GenerationConfig

import stillhouse
from stillhouse.check import check_recipe
from stillhouse.data.turn_end import end_of_answers, turn_end
from stillhouse.evaluation.generate import generate
from stillhouse.export.checkpoint import _save
from stillhouse.export.gguf_export import write_form
from stillhouse.export.modelfile import modelfile
from stillhouse.students.student import Student
from tests import tiny
from tests.chat_toys import CHATML, GEMMA, chat, save_model, shown, tokenizer, write_jsonl


def base_model(folder: Path) -> Path:
    """Like Qwen 2.5's base model: its EOS is <|endoftext|>, but its template ends turns with
    <|im_end|>."""
    return save_model(folder, tokenizer(eos="<|endoftext|>"), ends=[0])


def scripted_model(model: Any, ids: list[int]) -> Any:
    """The model, patched to write these tokens in order, over and over."""
    forward, written = model.forward, iter(ids * 20)

    def scripted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., next(written)] = 1.0
        return output

    model.forward = scripted
    return model


def test_the_end_of_turn_token_is_learned_and_ends_answers() -> None:
    words = tokenizer(eos="<|endoftext|>")
    assert shown(chat("Say 500", "ok"), words)[0].endswith("assistant\n[[ok<|im_end|>]]\n")
    end = turn_end(words)
    assert end is not None
    assert (end.text, end.written) == ("<|im_end|>", True)
    assert end_of_answers(words, GenerationConfig(eos_token_id=0)) == {0, end.id}


def test_generated_answers_end_at_the_end_of_turn_token(tmp_path: Path) -> None:
    student = Student.load(base_model(tmp_path / "base"))
    ids = student.tokenizer("ok<|im_end|>ok", add_special_tokens=False)["input_ids"]
    model = scripted_model(student.model, ids)
    assert generate(model, student.tokenizer, ["Say 500"], max_new_tokens=24) == ["ok"]


def test_every_export_ends_answers_with_the_end_of_turn_token(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    end = turn_end(tokenizer(eos="<|endoftext|>"))
    assert end is not None
    Student.load(base).save(tmp_path / "student")
    _save(base, tmp_path / "shipped", torch.bfloat16)
    for folder in (tmp_path / "student", tmp_path / "shipped"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, end.id]
    write_form(base, tmp_path / "student.gguf", kind="f16", name="student")
    fields = GGUFReader(tmp_path / "student.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end.id
    text = modelfile(base, "student.gguf")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text


def test_a_generation_config_that_contains_the_token_is_unchanged(tmp_path: Path) -> None:
    words = tokenizer()
    Student.load(save_model(tmp_path / "base", words, ends=[5, 0])).save(tmp_path / "student")
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [5, 0]


@pytest.mark.run
def test_check_reports_the_end_of_turn_token_of_both_models(tmp_path: Path) -> None:
    special = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
    words = tokenizer(CHATML, eos="<|endoftext|>", special=special)
    save_model(tmp_path / "student", words)
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat("Hi", "Hello.")}] * 40)
    (tmp_path / "text.txt").write_text("")

    def said(template: str) -> list[tuple[str, str]]:
        words.chat_template = template
        save_model(tmp_path / "teacher", words)
        raw = tiny.recipe(
            tmp_path,
            data={"sources": [{"kind": "file", "path": str(tmp_path / "chat.jsonl")}]},
        )
        raw["student"] = {"start": "pretrained", "model": str(tmp_path / "student")}
        found = [one for one in check_recipe(raw) if one.topic == "chat template"]
        return [(one.level, one.text) for one in found]

    ends = "<|im_end|> ends each assistant turn and is learned, so that it ends answers"
    alike = ("ok", f"loss on assistant turns; {ends}; see `stillhouse preview`")
    other = "the teacher's turns end with <end_of_turn>, but the student's with <|im_end|>"
    assert said(CHATML) == [alike]
    assert said(GEMMA) == [alike, ("warning", other)]


@pytest.mark.run
def test_the_student_of_a_run_stops_after_its_answer(tmp_path: Path) -> None:
    base_model(tmp_path / "teacher")
    rows = [{"messages": chat(f"Say {n}", "ok")} for n in range(200)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    (tmp_path / "text.txt").write_text("")
    raw = tiny.recipe(
        tmp_path,
        data={"sources": [{"kind": "file", "path": str(path)}], "context": 64},
        student={"start": "pretrained", "model": "teacher"},
        train={"max_steps": 60, "learning_rate": 0.01},
        objective={"terms": [{"divergence": "cross_entropy"}]},
    )
    raw["student"] = {"start": "pretrained", "model": str(tmp_path / "teacher")}
    result = stillhouse.run(raw, base=tmp_path)
    assert result is not None
    model = AutoModelForCausalLM.from_pretrained(result.model).eval()
    words = tokenizer(eos="<|endoftext|>")
    asked = words.apply_chat_template(
        chat("Say 500"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**asked, max_new_tokens=24, do_sample=False)
    assert words.decode(written[0, asked["input_ids"].shape[1] :]) == "ok<|im_end|>"
