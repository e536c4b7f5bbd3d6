"""`Distillation` alone and in a trainer, with models in memory and without a run folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback, TrainingArguments

from stillhouse.data.batches import collate
from stillhouse.errors import ModelError, SignalError, TrainingError
from stillhouse.objectives import fused_loss
from stillhouse.objectives.objective_config import (
    HiddenStatesTerm,
    LogitsTerm,
    ObjectiveRecipe,
    ObjectiveTerm,
)
from stillhouse.signals import ChunkSignal
from stillhouse.students.student import Student
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.teachers.teacher import OUTPUT_ONLY, TeacherView
from stillhouse.training import score_step as scoring
from stillhouse.training.distillation import Distillation
from stillhouse.training.score_step import cut_chunks, score_step
from stillhouse.training.train import TrainingResult, train
from stillhouse.training.train_config import TrainRecipe
from stillhouse.training.trainer import DistillationTrainer
from tests import tiny
from tests.training.conftest import Setting

KL = ObjectiveRecipe()
SECTION = TrainRecipe(batch_size=4, precision="float32", max_steps=4, checkpoint_every=2)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def trained(setting: Setting, student: Student, **options: Any) -> TrainingResult:
    teacher = setting.load_teacher()
    return train(student, teacher, setting.windows, KL, SECTION, **options)


class Generating(TrainerCallback):
    """Generates from the student after each step."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        ids = torch.tensor([[5, 6, 7]])
        found = model.student.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        self.lengths.append(found.shape[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_student_can_generate_between_training_steps(setting: Setting, precision: str) -> None:
    student, quiet = (Student.load(setting.student) for _ in range(2))
    section = SECTION.model_copy(update={"precision": precision, "gradient_checkpointing": True})
    callback = Generating()
    run = (setting.load_teacher(), setting.windows, KL, section)
    train(student, *run, callbacks=[callback])
    train(quiet, *run)
    assert callback.lengths == [7] * 4
    assert "forward" not in vars(student.model)
    assert type(student.model).forward is LlamaForCausalLM.forward
    assert_same(weights(student.model), weights(quiet.model))


def test_training_in_memory_and_in_a_folder_gives_the_same_student(
    setting: Setting, tmp_path: Path
) -> None:
    kept, live = (Student.load(setting.student) for _ in range(2))
    trained(setting, kept, folder=tmp_path)
    result = trained(setting, live)
    assert_same(weights(live.model), weights(kept.model))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(weights(saved), weights(live.model))
    assert result.steps == len(result.metrics) == 4
    assert "4 of 4 steps" in repr(result)


def test_training_changes_nothing_of_the_model_but_its_weights(setting: Setting) -> None:
    student = Student.load(setting.student)
    before, config = weights(student.model), copy.deepcopy(student.model.config.to_dict())
    trained(setting, student)
    assert student.model.config.to_dict() == config
    assert student.model.config._attn_implementation == "sdpa"
    assert not student.model.training
    assert not torch.equal(
        before["model.norm.weight"], student.model.state_dict()["model.norm.weight"]
    )


def test_training_falls_back_from_a_damaged_checkpoint_without_a_student_folder(
    setting: Setting, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(setting.student)
    whole, again = (Student(copy.deepcopy(model), tiny.tokenizer()) for _ in range(2))
    trained(setting, whole, folder=tmp_path)
    shutil.rmtree(tmp_path / "model")
    for step in (2, 4):
        file = tmp_path / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt"
        file.write_bytes(b"x" * file.stat().st_size)
    trained(setting, again, folder=tmp_path)
    assert (tmp_path / "checkpoints" / "damaged-checkpoint-2").is_dir()
    assert_same(weights(again.model), weights(whole.model))


def test_the_loss_under_several_teachers_is_the_mean_of_theirs(setting: Setting) -> None:
    student = tiny.llama(seed=1)
    teachers = [LocalTeacher(tiny.llama(seed=seed)) for seed in (2, 3)]
    batch = collate([setting.windows[number] for number in range(3)])
    alone = [
        Distillation(student, KL, each)(batch, each.answer(batch)).total.item() for each in teachers
    ]
    both = SeveralTeachers(teachers)
    loss = Distillation(student, KL, both)(batch, both.answer(batch))
    assert loss.total.item() == pytest.approx(sum(alone) / 2, rel=1e-6)


def test_several_teachers_need_at_least_one() -> None:
    with pytest.raises(ModelError, match="list of teachers is empty"):
        SeveralTeachers([])


def test_forward_is_the_fused_loss_of_the_supervised_rows(setting: Setting) -> None:
    student, teacher = tiny.llama(seed=1), LocalTeacher(tiny.llama())
    terms = [LogitsTerm(divergence="jsd", weight=0.5), LogitsTerm(divergence="cross_entropy")]
    module = Distillation(student, terms, teacher)
    batch = collate([setting.windows[0]])
    view = teacher.answer(batch, module.request)
    (signal,) = view.signals
    assert not isinstance(signal, ChunkSignal)
    rows = batch["labels"][0, 1:] != -100
    plain = {name: batch[name] for name in ("input_ids", "position_ids")}
    hidden_ND = student.model(**plain, use_cache=False).last_hidden_state[0, :-1][rows]
    expected = fused_loss(
        hidden_ND,
        teacher.head.__class__(student.lm_head.weight),
        module.objective.output.at(0.0),
        signal=signal,
        targets_N=batch["labels"][0, 1:][rows],
    )
    found = module(batch, view)
    torch.testing.assert_close(found.total, expected.total)
    assert found.rows == int(rows.sum())


class Doubling(DistillationTrainer):
    """Overrides the loss like a subclass of transformers.Trainer."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, **more
    )


def test_a_subclass_of_the_trainer_trains_plain_models(setting: Setting, tmp_path: Path) -> None:
    student, teacher = tiny.llama(seed=1, hidden_size=16), tiny.llama()
    terms: list[ObjectiveTerm] = [LogitsTerm(), HiddenStatesTerm(kind="hidden_states")]
    losses = []
    for kind in (DistillationTrainer, Doubling):
        trainer = kind(
            copy.deepcopy(student),
            teacher,
            terms,
            args=arguments(tmp_path, max_steps=2, logging_steps=1, save_strategy="no"),
            train_dataset=setting.windows,
            eval_dataset=setting.heldout,
        )
        trainer.train()
        losses.append(trainer.metrics.rows[0]["loss"])
        assert trainer.evaluate().keys() >= {"heldout_kl", "heldout_perplexity"}
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


def test_the_trainer_resumes_from_a_checkpoint_of_transformers(
    setting: Setting, tmp_path: Path
) -> None:
    found = []
    for name in ("whole", "resumed"):
        trainer = DistillationTrainer(
            tiny.llama(seed=1, hidden_size=16),
            tiny.llama(),
            [LogitsTerm(), HiddenStatesTerm(kind="hidden_states")],
            args=arguments(tmp_path / name, max_steps=4, save_steps=2, logging_steps=1),
            train_dataset=setting.windows,
        )
        if name == "resumed":
            shutil.copytree(
                tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2"
            )
        trainer.train(resume_from_checkpoint=name == "resumed")
        found.append(weights(trainer.student.model))
    assert_same(*found)


def test_a_process_uses_only_one_of_several_gpus(setting: Setting, tmp_path: Path) -> None:
    """transformers.Trainer would copy the model to every GPU at each step."""
    options = arguments(tmp_path)
    options._n_gpu = 4
    trainer = DistillationTrainer(
        tiny.llama(seed=1), tiny.llama(), args=options, train_dataset=setting.windows
    )
    assert trainer.args.n_gpu == 1


def test_models_with_different_vocabularies_are_rejected(setting: Setting) -> None:
    words = tiny.tokenizer()
    words.add_tokens(["<more>"])
    student = Student(tiny.llama(vocab_size=261), words)
    teacher = LocalTeacher(tiny.llama(), tiny.tokenizer())
    with pytest.raises(ModelError, match="different vocabularies"):
        train(student, teacher, setting.windows, KL, SECTION)


def test_terms_on_layers_of_several_teachers_are_rejected(setting: Setting) -> None:
    both = SeveralTeachers([LocalTeacher(tiny.llama(seed=seed)) for seed in (2, 3)])
    terms = ObjectiveRecipe(terms=[HiddenStatesTerm(kind="hidden_states")])
    with pytest.raises(SignalError, match="support only one teacher"):
        train(Student(tiny.llama()), both, setting.windows, terms, SECTION)


def test_evaluation_during_training_requires_held_out_text(setting: Setting) -> None:
    section = SECTION.model_copy(update={"evaluate_every": 2})
    with pytest.raises(TrainingError, match="no held-out text"):
        train(Student(tiny.llama()), setting.load_teacher(), setting.windows, KL, section)


def test_chunks_are_split_with_their_rows() -> None:
    rows_P, chunk_P = torch.tensor([1, 2, 4, 5, 6]), torch.tensor([0, 0, 1, 1, 2])
    signal = ChunkSignal(rows_P, chunk_P, torch.tensor([-1.0, -2.0, -3.0]))
    first, second = cut_chunks(signal, slice(0, 4)), cut_chunks(signal, slice(4, 7))
    assert (first.rows_P.tolist(), first.chunk_P.tolist()) == ([1, 2], [0, 0])
    assert (second.rows_P.tolist(), second.chunk_P.tolist()) == ([0, 1, 2], [0, 0, 1])
    assert second.log_probs_C.tolist() == [-2.0, -3.0]


@pytest.mark.parametrize("together", [1, 1 << 20])
@pytest.mark.parametrize("count", [1, 3])
def test_answers_of_a_step_wait_in_host_memory(
    setting: Setting, together: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several micro-batches, the answers must not add up in the GPU's memory."""
    host, moves = torch.device("cpu", 0), list[torch.device]()
    moved = scoring._moved

    def recorded(view: TeacherView, device: torch.device) -> TeacherView:
        moves.append(device)
        return moved(view, device)

    monkeypatch.setattr(scoring, "HOST", host)
    monkeypatch.setattr(scoring, "_moved", recorded)
    teacher = setting.load_teacher()
    assert teacher is not None
    monkeypatch.setattr(teacher, "tokens_together", together)
    batches = [collate([setting.windows[0]]) for _ in range(count)]
    gpu = torch.device("cpu")
    views = score_step(teacher, batches, OUTPUT_ONLY, gpu, rows=1)
    next(views)
    assert moves == [host if count > 1 else gpu] * count + [gpu]
