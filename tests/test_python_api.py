"""The Python API with objects in memory. test_docs.py runs docs/python.md."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import stillhouse as sh
from stillhouse.errors import (
    DataError,
    ModelError,
    RecipeError,
    RunError,
    SignalError,
    TrainingError,
)
from stillhouse.file_locks import locked_while_writing
from stillhouse.signals.encodings import Threshold
from stillhouse.training import checkpoints
from tests import tiny


@pytest.fixture(scope="module")
def data() -> sh.Data:
    return sh.Data.build(
        tiny.text(200).splitlines(), tiny.tokenizer(), context=32, heldout_tokens=256
    )


@pytest.fixture
def teacher() -> Any:
    return sh.Teacher.from_model(tiny.llama(intermediate_size=512), tiny.tokenizer())


def wrong(value: object) -> Any:
    """A value of a type that the type checker rejects."""
    return value


def own() -> sh.Student:
    return sh.Student(tiny.llama(), tiny.tokenizer())


def test_every_exported_name_exists() -> None:
    assert all(getattr(sh, name) is not None for name in sh.__all__)
    assert set(dir(sh)) >= {"Teacher", "Student", "Data", "KL", "distill", "evaluate", "run"}


def test_distill_trains_a_model_in_place(data: sh.Data) -> None:
    model = tiny.llama(seed=1)
    before = model.model.norm.weight.clone()
    result = sh.distill(model, tiny.llama(), data, max_steps=2, batch_size=4)
    assert result.steps == 2
    assert not torch.equal(model.model.norm.weight, before)


def test_a_list_of_teachers_gives_the_mean_of_their_losses(data: sh.Data) -> None:
    losses = [
        sh.distill(tiny.llama(seed=1), taught_by, data, max_steps=1, batch_size=4).metrics[0][
            "loss"
        ]
        for taught_by in (tiny.llama(seed=2), tiny.llama(seed=3), [tiny.llama(2), tiny.llama(3)])
    ]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-4)


def test_distill_without_a_teacher_is_fine_tuning(data: sh.Data) -> None:
    result = sh.distill(
        tiny.llama(), None, data, objective=[sh.CrossEntropy()], max_steps=1, batch_size=4
    )
    assert result.metrics[0]["loss"] == pytest.approx(result.metrics[0]["cross_entropy"], rel=1e-6)


def test_an_evaluation_is_shown_as_a_table(teacher: Any, data: sh.Data) -> None:
    student = sh.Student.random(teacher, num_hidden_layers=1)
    found = sh.evaluate(student, teacher, data, prompts=["the cat"], max_new_tokens=3)
    roles = {model.role: model.fidelity.kl for model in found.models}
    assert roles["student"] > roles["teacher"] == pytest.approx(0, abs=1e-6)
    assert set(found.generations[0].answers) == {"teacher", "student"}
    assert "KL to the teacher (nats/token)" in str(found)
    assert all(line == line.rstrip() for line in str(found).splitlines())


@pytest.mark.run
def test_sizes_found_by_a_search_meet_the_target(teacher: Any, data: sh.Data) -> None:
    search = {"candidates": 2, "trained": 0, "heldout_tokens": 128, "calibration_tokens": 512}
    sizes = sh.search_sizes(teacher, data, params="60%", calibration_tokens=512, search=search)
    student = sh.Student.prune(teacher, data, calibration_tokens=512, **sizes)
    share = student.model.num_parameters() / teacher.model.num_parameters()
    assert 0.57 <= share <= 0.6


@pytest.mark.parametrize(
    ("call", "message", "fix"),
    [
        (
            lambda d: sh.distill(tiny.llama(), None, d, learning_rat=1),
            "learning_rat",
            "did you mean",
        ),
        (lambda d: sh.distill(tiny.llama(), None, d, learning_rate=-1), "greater than 0", ""),
        (lambda d: sh.divergence("kl"), "divergence", ""),
        (lambda d: sh.KL(beta=-1), "beta", ""),
        (
            lambda d: sh.distill(tiny.llama(), None, d, objective=[sh.KL(), sh.KL(weight=2)]),
            "two forward_kl terms are the same",
            "",
        ),
        (
            lambda d: sh.distill(tiny.llama(), None, d, schedule="wsd", warmup=0.6, decay=0.5),
            "more than all steps",
            "",
        ),
        (
            lambda d: sh.Rollouts(terms=[{"divergence": "jsd"}, {"divergence": "jsd"}]),
            "two jsd terms are the same",
            "",
        ),
        (lambda d: sh.KL(temperature=1e-320), "temperature: it must be at least 0.001", ""),
        (lambda d: sh.distill(tiny.llama(), None, d, seed=2**32), "seed: .* 4294967295", ""),
        (lambda d: sh.distill(tiny.llama(), None, d, epochs=float("inf")), "epochs: .*inf", ""),
        (lambda d: sh.distill(tiny.llama(), None, d, objective=[sh.KL(weight=0)]), "weight 0", ""),
        (lambda d: sh.evaluate(tiny.llama(), tiny.llama(), d, seed=-1), "seed", ""),
        (
            lambda d: sh.evaluate(own(), tiny.llama(), d, max_new_tokens=0),
            "max_new_tokens",
            "",
        ),
        (lambda d: sh.evaluate(own(), tiny.llama(), d, prompts=wrong([1])), "prompts", ""),
        (lambda d: sh.Teacher.served("http://h:99999", "m", None), "base_url must be", ""),
        (lambda d: sh.Teacher.served("http://h", "m", None, k=0), "k: .*greater than 0", ""),
        (lambda d: sh.Teacher.served("http://h", "m", None, concurrency=10**9), "4096", ""),
        (lambda d: sh.record(None, d, "x", temperature=float("nan")), "temperature", ""),
        (lambda d: sh.search_sizes(None, d, seed=10**5000), "seed: .*80 digits", ""),
        (lambda d: sh.Student.random(None, seed=True), "seed", ""),
        (lambda d: sh.Data.build(["a"], None, seed=wrong(1.5)), "seed", ""),
        (lambda d: sh.Data.build(["a"], None, documents=wrong("x")), "documents: .*'line'", ""),
        (lambda d: sh.run(wrong(5)), "the recipe is a int", "give the path"),
        (
            lambda d: sh.distill(own(), None, d, objective=wrong(sh.KL())),
            "the objective is a LogitsTerm instead of a list",
            r"objective=[KL()]",
        ),
        (lambda d: sh.distill(own(), None, d, objective=wrong("kl")), "objective is a str", ""),
        (lambda d: sh.Distillation(own(), wrong(["kl"])), "terms.0", ""),
        (
            lambda d: sh.distill(own(), None, d, batches=wrong(d.train)),
            "batches is a .* instead of Rollouts",
            "give Rollouts",
        ),
        (
            lambda d: sh.record(tiny.llama(), d, "x", encoding=wrong("top_k")),
            "the encoding is a str",
            "TopK(32)",
        ),
        (
            lambda d: sh.search_sizes(tiny.llama(), d, settings=wrong({"max_steps": 1})),
            "settings is a dict instead of TrainRecipe",
            "",
        ),
        (
            lambda d: sh.search_sizes(tiny.llama(), d, params="60%", search={"tolerence": 0.1}),
            r"no option search\.tolerence",
            "did you mean tolerance?",
        ),
        (
            lambda d: sh.KL(schedule={"start": 1, "end": 0, "until": 1}),
            r"no option schedule\.until",
            "use one of: start, end, begin, finish, shape",
        ),
        (
            lambda d: sh.distill(own(), None, d, objective=wrong([{"temperture": 2}])),
            r"no option terms\.0\.temperture",
            "did you mean temperature?",
        ),
        (
            lambda d: sh.search_sizes(tiny.llama(), d, params="60%", vocabulary=300),
            "only in recipes",
            "stillhouse.run",
        ),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    data: sh.Data, call: Any, message: str, fix: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        call(data)
    assert fix in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: sh.distill("folder", None, d), "the student is a str .*Student.pretrained"),
        (lambda d: sh.distill(tiny.llama(), "folder", d), "the teacher is a str .*Teacher.load"),
        (lambda d: sh.distill(tiny.llama(), [3], d), "the teacher is a int .*Teacher.load"),
        (lambda d: sh.record("folder", d, "x"), "the teacher is a str .*Teacher.load"),
        (lambda d: sh.search_sizes("folder", d), "the teacher is a str .*Teacher.load"),
        (
            lambda d: sh.distill(tiny.llama(), None, wrong("text.txt")),
            "data is a str, .*Data.build",
        ),
        (
            lambda d: sh.distill(tiny.llama(), None, wrong([torch.arange(9)])),
            "data is a list, not windows.*Data.build",
        ),
        (
            lambda d: sh.distill(tiny.llama(), None, wrong([{"input_ids": torch.arange(9)}])),
            "no tensors named labels, position_ids.*Data.build",
        ),
        (
            lambda d: sh.distill(tiny.llama(), None, wrong([d.train[0]])),
            "list of windows, without the attributes context and supervised_tokens.*Data.build",
        ),
        (lambda d: sh.evaluate(tiny.llama(), tiny.llama(), d), "a tokenizer.*Teacher.from_model"),
        (lambda d: sh.Student("folder"), "the student is a str .*Student.pretrained"),
        (lambda d: sh.Student(tiny.llama(), "folder"), "the tokenizer is a str .*AutoTokenizer"),
        (lambda d: sh.Student.pretrained(wrong(tiny.llama())), r"a LlamaForCausalLM .*Student\("),
        (lambda d: sh.Student.random("folder"), "the start is a str .*Teacher.load.*AutoConfig"),
        (lambda d: sh.Student.random(tiny.llama()), "the start is a LlamaForCausalLM"),
        (lambda d: sh.Student.random(tiny.llama_config(), "folder"), "the tokenizer is a str"),
        (lambda d: sh.Student.prune(wrong("folder"), d), "the teacher is a str .*Teacher.load"),
        (lambda d: sh.Student.prune(wrong(tiny.llama()), d), "LlamaForCausalLM .*from_model"),
        (
            lambda d: sh.Student.prune(sh.Teacher.from_model(tiny.llama()), wrong("text.txt")),
            "the text is a str .*Data.build",
        ),
        (lambda d: sh.Teacher.load(wrong(tiny.llama())), "a LlamaForCausalLM .*from_model"),
        (lambda d: sh.Teacher.from_model("folder"), "the teacher is a str .*Teacher.load"),
        (lambda d: sh.Teacher.from_model(tiny.llama(), "folder"), "the tokenizer is a str"),
        (lambda d: sh.Teacher.served("http://h", "m", "folder"), "the tokenizer is a str"),
        (lambda d: sh.Teacher.from_model(tiny.llama()).aligned("folder"), "the tokenizer is a str"),
        (lambda d: sh.Data.build(["a"], "folder"), "the tokenizer is a str"),
        (lambda d: sh.Data.build(["a"], None), "the tokenizer is a NoneType"),
        (lambda d: sh.Distillation("folder"), "the student is a str .*Student.pretrained"),
        (lambda d: sh.Distillation(own(), teacher=wrong("x")), "the teacher is a str"),
        (lambda d: sh.DistillationTrainer(wrong("folder")), "the student is a str"),
    ],
)
def test_a_wrong_argument_is_one_error_with_the_call_to_make(
    data: sh.Data, call: Any, message: str
) -> None:
    with pytest.raises((ModelError, DataError), match=f"(?s){message}"):
        call(data)


@pytest.mark.parametrize(
    "term", [sh.KL(), sh.HiddenStates(), sh.AttentionRelations(heads=2), sh.Chunks()]
)
def test_terms_that_need_a_teacher_are_rejected_without_one(data: sh.Data, term: Any) -> None:
    with pytest.raises(SignalError, match="there is none") as caught:
        sh.distill(tiny.llama(), None, data, objective=[term], max_steps=1, batch_size=4)
    assert "give a teacher" in str(caught.value.fix)


def test_a_store_of_sampled_signals_and_a_live_teacher_can_be_combined(
    teacher: Any, data: sh.Data, tmp_path: Path
) -> None:
    stored = sh.record(teacher, data, tmp_path, encoding=Threshold(0.05))
    other = sh.Teacher.from_model(tiny.llama(seed=2), tiny.tokenizer())
    both, first, second = (
        sh.distill(tiny.llama(seed=1), taught_by, data, max_steps=1, batch_size=4).metrics[0]
        for taught_by in ([stored, other], stored, other)
    )
    assert both["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2, rel=1e-4)
    for name, alone in (("teacher_cross_entropy", first), ("forward_kl", second)):
        assert both[name] == pytest.approx(alone[name], rel=1e-4)


def test_evaluate_needs_a_teacher_that_is_loaded(
    teacher: Any, data: sh.Data, tmp_path: Path
) -> None:
    stored = sh.record(teacher, data, tmp_path)
    with pytest.raises(ModelError, match="not loaded here"):
        sh.evaluate(tiny.llama(), stored, data)


def test_a_folder_is_reused_only_for_the_same_training(data: sh.Data, tmp_path: Path) -> None:
    def train(seed: int = 0, teacher: Any = None, **changed: Any) -> Any:
        settings = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, **changed}
        teacher = teacher or tiny.llama(seed=5)
        return sh.distill(tiny.llama(seed=1), teacher, data, seed=seed, folder=tmp_path, **settings)

    train(checkpoint_every=1)
    for changed, named in (
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"seed": 1}, "seed"),
        ({"teacher": tiny.llama(seed=6)}, "teacher"),
        ({"objective": [sh.ReverseKL()]}, "objective"),
    ):
        with pytest.raises(TrainingError, match=f"different values of {named}\n"):
            train(checkpoint_every=1, **changed)
    again = train(checkpoint_every=2, micro_batch_size=2)
    assert again.steps == 2, "settings that leave the result unchanged may change"


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_the_interval_of_checkpoints_may_change_after_a_kill(data: sh.Data, tmp_path: Path) -> None:
    def train(name: str, **more: Any) -> Any:
        options = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, **more}
        return sh.distill(tiny.llama(1), tiny.llama(), data, folder=tmp_path / name, **options)

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("killed", checkpoint_every=2, callbacks=[Killed()])
    resumed = train("killed", checkpoint_every=1, keep_checkpoints=3)
    found = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert found == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]


def test_a_full_disk_is_one_error(
    data: sh.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "seal", full)
    with pytest.raises(RunError, match="the disk is full") as caught:
        sh.distill(tiny.llama(), tiny.llama(1), data, max_steps=1, batch_size=4, folder=tmp_path)
    assert "free some space" in str(caught.value.fix)


def test_two_processes_cannot_use_one_folder(teacher: Any, data: sh.Data, tmp_path: Path) -> None:
    calls = {
        "training": lambda: sh.distill(tiny.llama(), teacher, data, max_steps=1, folder=tmp_path),
        "store": lambda: sh.record(teacher, data, tmp_path),
        "search": lambda: sh.search_sizes(teacher, data, params="60%", folder=tmp_path),
    }
    for what, call in calls.items():
        with (
            locked_while_writing(tmp_path, what),
            pytest.raises(RunError, match=f"another process is writing this {what}"),
        ):
            call()
        assert not list(tmp_path.iterdir())
