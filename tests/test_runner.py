"""Complete runs with tiny models: their files, repeated runs, kills, and errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import stillhouse
from stillhouse.commands import evaluate_model, prepare_data
from stillhouse.errors import DataError, ModelError, RecipeError, StillhouseError
from stillhouse.evaluation.results import Evaluation
from stillhouse.language_model import export_stage as shipping
from stillhouse.pipeline.kind import RunResult
from stillhouse.report.page import redraw_report
from stillhouse.training.checkpoints import read_metrics
from tests import forks, tiny
from tests.forks import Fork

pytestmark = pytest.mark.run


def run(raw: dict[str, Any]) -> RunResult:
    result = stillhouse.run(raw)
    assert result is not None
    return result


BASELINES = {"fine_tuning_baseline": True, "cut_baseline": True}


def write(raw: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("finished")
    raw = tiny.recipe(folder, evaluate=BASELINES)
    write(raw, folder)
    return folder, run(raw)


def test_a_run_leaves_a_model_that_plain_transformers_loads(
    finished: tuple[Path, RunResult],
) -> None:
    _, result = finished
    model = AutoModelForCausalLM.from_pretrained(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert model.dtype == torch.bfloat16
    assert model.config.intermediate_size == 32
    ids = tokenizer("the cat", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == 10


def test_a_run_measures_teacher_untrained_student_and_baselines(
    finished: tuple[Path, RunResult],
) -> None:
    evaluation = finished[1].evaluation
    roles = [model.role for model in evaluation.models]
    assert roles == ["teacher", "untrained", "student", "cut", "fine_tuned"]
    kl = {model.role: model.fidelity.kl for model in evaluation.models}
    assert kl["teacher"] == pytest.approx(0, abs=1e-6)
    assert kl["student"] < kl["untrained"]
    assert kl["cut"] != kl["untrained"], "the refit changes the weights"
    assert set(evaluation.generations[0].answers) == set(roles)


def test_a_run_ends_with_a_report_and_the_resolved_recipe(
    finished: tuple[Path, RunResult], charts: None
) -> None:
    folder, result = finished
    assert "<path" in redraw_report(result.folder, folder / "page.html").read_text()
    html = result.report.read_text()
    assert "tiny" in html
    assert "untrained" in html.lower()
    again = stillhouse.run(yaml.safe_load((result.folder / "recipe.yaml").read_text()))
    assert again is not None
    assert all(stage.reused for stage in again.stages)


def test_a_repeated_run_does_no_work(finished: tuple[Path, RunResult]) -> None:
    folder, first = finished
    stamps = {p: p.stat().st_mtime_ns for p in (first.folder / "stages").rglob("*")}
    again = run(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert all(stage.reused for stage in again.stages)
    assert {p: p.stat().st_mtime_ns for p in (first.folder / "stages").rglob("*")} == stamps


def test_a_changed_section_repeats_only_the_stages_that_depend_on_it(
    finished: tuple[Path, RunResult],
) -> None:
    folder, _ = finished
    raw = tiny.recipe(folder, evaluate={**BASELINES, "prompts": ["a dog"]})
    reused = {stage.name: stage.reused for stage in run(raw).stages}
    assert [name for name, kept in reused.items() if kept] == [
        "data",
        "student",
        "cut",
        "train",
        "baseline",
    ]


def test_a_touched_source_repeats_only_the_data_stage(
    finished: tuple[Path, RunResult],
) -> None:
    folder, _ = finished
    os.utime(folder / "text.txt", (1, 1))
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    reused = {stage.name: stage.reused for stage in run(raw).stages}
    assert [name for name, kept in reused.items() if not kept] == ["data"]


def test_a_quantized_student_has_the_same_weights_in_every_format(tmp_path: Path) -> None:
    """The student is quantized, trained while quantized, and exported to torchao and to GGUF."""
    pytest.importorskip("torchao")
    words = tiny.merging_tokenizer()
    tiny.llama(vocab_size=len(words)).save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    raw = tiny.recipe(
        tmp_path,
        quantize={"keep": ["layers.0"], "qat": {"tokens": 1000, "learning_rate": 1e-3}},
        export={"formats": ["safetensors", "gguf-q4_0"]},
    )
    result = run(raw)
    kl = {model.role: model.fidelity.kl for model in result.evaluation.models}
    assert list(kl) == ["teacher", "untrained", "student", "quantized", "quantized_trained"]
    assert kl["quantized_trained"] < kl["quantized"]
    found = {model.role: model for model in result.evaluation.models}
    assert found["quantized"].bytes_on_disk < found["student"].bytes_on_disk
    plain = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype="auto")
    file = result.folder / "gguf-q4_0" / "tiny-q4_0.gguf"
    packed = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    name = "model.layers.1.mlp.up_proj.weight"
    weights, others = dict(plain.named_parameters()), dict(packed.named_parameters())
    assert torch.equal(weights[name].dequantize(), others[name].bfloat16())
    kept = "model.layers.0.mlp.up_proj.weight"
    # Not quantized in either format: stored as bfloat16 in one and as float16 in the other.
    torch.testing.assert_close(weights[kept].float(), others[kept], rtol=0.004, atol=1e-6)
    html = result.report.read_text()
    assert "gguf-q4_0" in html
    assert "Student, QAT" in html
    for folder in ("model", "gguf-q4_0"):
        card = (result.folder / folder / "README.md").read_text()
        assert "| Student, QAT |" in card
    raw["quantize"]["qat"]["tokens"] = 500
    reused = {stage.name: stage.reused for stage in run(raw).stages}
    assert [name for name, kept in reused.items() if not kept] == [
        "qat",
        "evaluate",
        "export",
        "report",
    ]


def test_an_export_is_pushed_once_and_only_if_it_passes_its_replay(
    finished: tuple[Path, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    asked: list[list[str]] = []

    def push(section: Any, folders: dict[str, Path], name: str) -> dict[str, str]:
        asked.append([path.name for path in folders.values() if (path / "README.md").is_file()])
        return dict.fromkeys(folders, "address")

    monkeypatch.setattr(shipping, "push", push)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    raw["export"] = {"kl_limit": 1e-15, "push_to_hub": {"repo": "me/small"}}
    with pytest.raises(ModelError, match="differs from its source"):
        run(raw)
    assert asked == []
    del raw["export"]["kl_limit"]
    assert "push" in [stage.name for stage in run(raw).stages]
    assert {stage.name: stage.reused for stage in run(raw).stages}["push"]
    assert asked == [["model"]]


@pytest.mark.parametrize(
    "student",
    [
        {"start": "random", "overrides": {"hidden_size": 16, "num_hidden_layers": 1}},
        {"start": "pruned", "layers": 2, "calibration_tokens": 256},
    ],
    ids=["random", "depth"],
)
def test_random_and_shallower_students_improve_by_training(
    tmp_path: Path, student: dict[str, Any]
) -> None:
    raw = tiny.recipe(tmp_path)
    raw["student"] = student
    evaluation = run(raw).evaluation
    untrained, trained = evaluation.result("untrained"), evaluation.result("student")
    assert untrained is not None
    assert trained is not None
    assert trained.fidelity.kl < untrained.fidelity.kl


def test_a_pretrained_student_keeps_its_own_shape(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    tiny.save_model(tmp_path / "small", seed=5, hidden_size=16, num_attention_heads=2)
    raw["student"] = {"start": "pretrained", "model": str(tmp_path / "small")}
    model = AutoModelForCausalLM.from_pretrained(run(raw).model)
    assert model.config.hidden_size == 16


def test_chats_are_distilled_on_assistant_turns(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    lines = tiny.text(160).splitlines()
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(lines[::2], lines[1::2], strict=True)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw["data"] = {
        "sources": [{"kind": "jsonl", "path": str(path)}],
        "context": 80,
        "heldout_tokens": 300,
    }
    result = run(raw)
    data = next(stage for stage in result.stages if stage.name == "data")
    info = data.summary["train"]
    assert 0.3 < info["supervised_tokens"] / info["tokens"] < 0.6


# --- kill -9 ---------------------------------------------------------------------------------


def model_bytes(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def kill_when(process: Fork, seen: str, stages: Path) -> None:
    """Kill the process once a partial stage exists, or the finished one if that was missed."""
    finished = seen.partition(".partial")[0].removeprefix(".")
    while not list(stages.glob(seen)) and not list(stages.glob(finished)):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_killed_in_every_stage_ends_with_the_same_model(tmp_path: Path) -> None:
    undisturbed = tiny.recipe(tmp_path, folder=str(tmp_path / "undisturbed"))
    expected = model_bytes(run(undisturbed).folder)
    raw = tiny.recipe(tmp_path, folder=str(tmp_path / "killed"))
    recipe = write(raw, tmp_path)
    stages = tmp_path / "killed" / "stages"
    moments = [
        ".student-*.partial",
        ".train-*.partial/checkpoints/checkpoint-10",
        ".export-*.partial",
    ]
    for moment in moments:
        kill_when(forks.stillhouse("run", str(recipe)), moment, stages)
    again = forks.stillhouse("run", str(recipe))
    assert again.wait(timeout=600) == 0, again.errors()
    assert model_bytes(tmp_path / "killed") == expected


STORED = {"signals": {"encoding": {"kind": "top_k", "k": 8}}}
ROUNDED = {"quantize": {"kind": "int8", "qat": {"tokens": 400}}}


def torchrun(recipe: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "stillhouse", "run", str(recipe)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def two_processes(recipe: Path) -> None:
    for process in forks.two_stillhouse("run", str(recipe)):
        assert process.wait(timeout=300) == 0, process.errors()[-3000:]


@pytest.mark.parametrize(
    ("more", "shard", "launch"),
    [
        (STORED, "auto", two_processes),
        pytest.param(STORED, "auto", torchrun, marks=pytest.mark.processes),
        pytest.param(ROUNDED, "both", two_processes, marks=pytest.mark.slow),
    ],
)
def test_two_processes_run_the_complete_recipe(
    tmp_path: Path, more: dict[str, Any], shard: str, launch: Callable[[Path], None]
) -> None:
    """Two processes measure the same as one. Nothing needs to be sharded here, so `auto` gives each
    of them both models."""
    own_text = {"own_text": {"answers": 6, "max_tokens": 8}}
    raw = tiny.recipe(tmp_path, train={"micro_batch_size": 4}, evaluate=own_text, **more)
    alone = stillhouse.run({**raw, "folder": str(tmp_path / "alone")})
    raw["train"] |= {"micro_batch_size": 2, "shard": shard}
    launch(write(raw, tmp_path))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    stages = tmp_path / "run" / "stages"
    assert not list(stages.glob(".*.partial"))
    (found,) = stages.glob("evaluate-*/evaluation.json")
    measured = Evaluation.load(found)
    for one, two in zip(alone.evaluation.models, measured.models, strict=True):
        assert one.role == two.role
        assert one.fidelity.tokens == two.fidelity.tokens
        assert one.fidelity.kl == pytest.approx(two.fidelity.kl, abs=1e-4)
        assert one.fidelity.perplexity == pytest.approx(two.fidelity.perplexity, rel=1e-4)
    one_own, two_own = (
        found.result("untrained").own_text for found in (alone.evaluation, measured)
    )
    assert vars(two_own) == pytest.approx(vars(one_own), abs=1e-4)
    sharded = any("The teacher is sharded" in note for note in measured.notes)
    assert sharded == (shard == "both")


# --- errors of users ---------------------------------------------------------------------------


def assert_rejected(raw: dict[str, Any], kind: type[StillhouseError], expected: str) -> None:
    with pytest.raises(kind, match=expected) as caught:
        stillhouse.run(raw)
    assert caught.value.fix or caught.value.where


def test_a_missing_teacher_is_rejected(tmp_path: Path) -> None:
    assert_rejected(tiny.recipe(tmp_path, teacher={"model": "./nowhere"}), ModelError, "nowhere")


def test_a_folder_that_is_not_a_model_is_rejected(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    (tmp_path / "empty").mkdir()
    raw["teacher"] = {"model": str(tmp_path / "empty")}
    assert_rejected(raw, ModelError, r"config\.json")


def test_a_truncated_teacher_is_rejected(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_rejected(raw, ModelError, "(?i)cut|truncat|shorter|incomplete|damaged")


def test_a_truncated_gguf_file_is_rejected(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    raw["teacher"] = {"model": str(tmp_path / "model.gguf")}
    assert_rejected(raw, ModelError, "(?i)gguf")


def test_a_student_with_other_tokens_is_rejected_if_they_must_be_the_same(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    tiny.save_model(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    core = json.loads(path.read_text())
    vocabulary = core["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(core))
    raw["teacher"]["tokenizer"] = "same"
    raw["student"] = {"start": "pretrained", "model": str(tmp_path / "other")}
    assert_rejected(raw, ModelError, "token")
    assert not (tmp_path / "run" / "stages").exists() or not list(
        (tmp_path / "run" / "stages").iterdir()
    )


def test_a_chat_longer_than_the_context_is_rejected(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 50, "completion": "b" * 50}) + "\n")
    raw["data"]["sources"] = [{"kind": "jsonl", "path": str(path)}]
    assert_rejected(raw, DataError, "(?i)context")


def test_empty_data_is_rejected(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    (tmp_path / "text.txt").write_text("\n \n")
    assert_rejected(raw, DataError, "(?i)no text|empty")


def test_a_size_larger_than_the_teachers_is_rejected(tmp_path: Path) -> None:
    assert_rejected(tiny.recipe(tmp_path, student={"ffn_size": 999}), RecipeError, "ffn_size: 999")


def test_a_full_disk_is_one_error_and_keeps_finished_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    raw = tiny.recipe(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shipping, "export_checkpoint", full)
        with pytest.raises(StillhouseError, match="disk is full"):
            stillhouse.run(raw)
    reused = {stage.name: stage.reused for stage in run(raw).stages}
    assert reused["train"]
    assert not reused["export"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_reports_that_the_same_command_resumes(
    tmp_path: Path, number: int, status: int
) -> None:
    recipe = write(tiny.recipe(tmp_path), tmp_path)
    process = forks.stillhouse("run", str(recipe))
    while not list((tmp_path / "run" / "stages").glob(".train-*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    assert process.poll() == status
    assert "run the same command to resume" in stderr
    assert "Traceback" not in stderr


# --- other commands ---------------------------------------------------------------------------


def test_evaluate_compares_any_model_with_the_teacher(
    finished: tuple[Path, RunResult],
) -> None:
    folder, result = finished
    recipe = folder / "recipe.yaml"
    own = evaluate_model(recipe)
    given = evaluate_model(recipe, model=str(folder / "teacher"))
    student, teacher = own.result("student"), given.result("student")
    measured = result.evaluation.result("student")
    assert student is not None and teacher is not None and measured is not None  # noqa: PT018
    assert student.fidelity.kl == pytest.approx(measured.fidelity.kl, abs=0.01)
    assert teacher.fidelity.kl == pytest.approx(0, abs=1e-6)


def test_evaluate_measures_the_checkpoint_of_a_run_that_exports_no_safetensors(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    folder, result = finished
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "stages").symlink_to(result.folder / "stages")
    raw = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"folder": str(run_folder)}
    recipe = write(raw, tmp_path)
    with pytest.raises(ModelError, match="no finished model yet"):
        evaluate_model(recipe)
    (run_folder / "checkpoint").symlink_to((result.folder / "checkpoint").resolve())
    student = evaluate_model(recipe).result("student")
    measured = result.evaluation.result("student")
    assert student is not None and measured is not None  # noqa: PT018
    assert student.fidelity.kl == pytest.approx(measured.fidelity.kl, abs=1e-6)


def test_prepare_data_reuses_the_data_stage_of_the_run(finished: tuple[Path, RunResult]) -> None:
    folder, _ = finished
    _, windows, heldout = prepare_data(folder / "recipe.yaml")
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert windows.path.parent == next(s.path for s in run(raw).stages if s.name == "data")
    assert len(heldout) > 0


def test_the_model_in_a_copied_run_folder_can_be_loaded(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    _, result = finished
    shutil.copytree(result.folder, tmp_path / "moved", symlinks=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "model") is not None


def test_a_moved_run_with_rebuilt_data_does_not_train_again(tmp_path: Path) -> None:
    def recipe(folder: Path) -> dict[str, Any]:
        source = {"kind": "text", "path": "text.txt", "documents": "line"}
        return tiny.recipe(folder, teacher={"model": "./teacher"}, data={"sources": [source]})

    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    stillhouse.run(recipe(before), base=before)
    before.rename(after)
    (data,) = (after / "run" / "stages").glob("data-*")
    shutil.rmtree(data)
    result = stillhouse.run(recipe(after), base=after)
    assert result is not None
    done = [stage.name for stage in result.stages if not stage.reused]
    assert set(done) <= {"data", "report"}


def test_several_teachers_give_the_mean_of_their_losses(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "other", seed=5)
    names = ["teacher", str(tmp_path / "other")]
    first: dict[str, float] = {}
    for teachers in (names, names[:1], names[1:]):
        folder = str(tmp_path / str(len(first)))
        raw = tiny.recipe(tmp_path, train={"teachers": teachers, "max_steps": 1}, folder=folder)
        result = stillhouse.run(raw)
        assert result is not None
        trained = next(stage for stage in result.stages if stage.name == "train")
        first["+".join(teachers)] = read_metrics(trained.path / "metrics.jsonl")[0]["forward_kl"]
    both, one, other = first.values()
    assert both == pytest.approx((one + other) / 2, rel=1e-4)
    assert one != pytest.approx(other, rel=0.01)
