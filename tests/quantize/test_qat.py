"""Training with rounded weights agrees with the same steps computed explicitly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from stillhouse.commands import prepare_data
from stillhouse.data.windows import Windows
from stillhouse.evaluation.fidelity import compare, heldout_answers
from stillhouse.language_model import quantize_stage as stages
from stillhouse.language_model import train_stage
from stillhouse.language_model.job import find_models
from stillhouse.objectives import Mixture
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.quantize.grid import Grid, on_grid
from stillhouse.quantize.qat import RoundedWeights
from stillhouse.quantize.quantization import FILE, Quantization
from stillhouse.quantize.quantize import qat_section, quantize, train_quantized
from stillhouse.quantize.quantize_config import QatRecipe, QuantizeRecipe
from stillhouse.quantize.units import find_units, scales_of
from stillhouse.runfolder import Cost, Stage
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.model_source import AnyModel, ModelSource
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.training.distillation import Distillation
from stillhouse.training.objective import Objective
from stillhouse.training.own_prompts import OwnPrompts
from stillhouse.training.rollouts import read_rollouts, window_folder
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe
from tests import tiny

pytestmark = pytest.mark.run


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(8, None, floating=True)])
def test_two_steps_are_those_of_a_straight_through_estimator(grid: Grid) -> None:
    """Compared with functional calls on rounded weights, and SGD on the latent weights."""
    model, other = tiny.llama(), tiny.llama()
    units = find_units(model, grid)
    scales = scales_of(model, units, grid)
    rounded = RoundedWeights(Quantization(grid, False, scales))
    ids_RL = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = Distillation(model, Objective(Mixture(())))
    rounded.on_train_begin(None, None, None, model=trained)
    for _ in range(2):
        rounded.on_step_begin(None, None, None, model=trained)
        model(input_ids=ids_RL, labels=ids_RL).loss.backward()
        rounded.on_pre_optimizer_step(None, None, None, model=trained)
        optimizer.step()
        optimizer.zero_grad()
    rounded.on_train_end(None, None, None)

    parameters = dict(other.named_parameters())
    for _ in range(2):
        on = {
            name: (on_grid(p, scales[name], grid) if name in scales else p.detach().clone())
            for name, p in parameters.items()
        }
        on = {name: p.requires_grad_() for name, p in on.items()}
        logits = torch.func.functional_call(
            other,
            {**on, "lm_head.weight": on["model.embed_tokens.weight"]},
            kwargs={"input_ids": ids_RL},
        ).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_RL[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(on.values()))
        with torch.no_grad():
            for p, gradient in zip(parameters.values(), gradients, strict=True):
                p -= 0.1 * gradient
    for name, p in model.named_parameters():
        assert torch.allclose(p, parameters[name], atol=1e-6), name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Windows, Windows]:
    folder = tmp_path_factory.mktemp("prepared")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe(folder)))
    _, windows, heldout = prepare_data(recipe)
    return folder / "teacher", windows, heldout


@pytest.mark.parametrize("kind", ["int4", "int8_dynamic_int4"])
def test_training_with_rounded_weights_lowers_the_kl_of_rounding(
    prepared: tuple[Path, Windows, Windows],
    tmp_path: Path,
    kind: Literal["int4", "int8_dynamic_int4"],
) -> None:
    """The student is the teacher itself, so rounding is the only loss."""
    teacher, windows, heldout = prepared
    section = QuantizeRecipe(kind=kind, qat=QatRecipe(tokens=2500, learning_rate=1e-3))
    common: dict[str, Any] = {"section": section, "vocabulary": 260, "seed": 0}
    quantize(teacher, tmp_path / "ptq", heldout=heldout, **common)
    result = train_quantized(
        Student.load(teacher),
        LocalTeacher(load_model(teacher, dtype=torch.float32)),
        windows,
        ObjectiveRecipe(),
        TrainRecipe(batch_size=4, precision="float32", checkpoint_every=1000),
        quantized=tmp_path / "ptq",
        section=section,
        heldout=heldout,
        folder=tmp_path / "qat",
    )
    assert result.steps == 20
    quantization = Quantization.load(tmp_path / "qat" / FILE)
    assert quantization.scales.keys() == Quantization.load(tmp_path / "ptq" / FILE).scales.keys()

    reference = heldout_answers(load_model(teacher, dtype=torch.float32), heldout)
    kl = {}
    for name in ("ptq", "qat"):
        model = load_model(tmp_path / name / "model", dtype=torch.float32)
        on = {n: p.clone() for n, p in model.named_parameters()}
        quantization.apply(model)
        assert all(torch.equal(p, on[n]) for n, p in model.named_parameters()), "on the grid"
        kl[name] = compare(heldout_answers(model, heldout), reference, 260).kl
    assert kl["qat"] < 0.7 * kl["ptq"]


def test_an_interrupted_and_resumed_training_has_the_same_weights(
    prepared: tuple[Path, Windows, Windows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints contain the latent weights, so the result is the same bit for bit."""
    teacher, windows, heldout = prepared
    section = QuantizeRecipe(qat=QatRecipe(tokens=1000, learning_rate=1e-3))
    quantize(teacher, tmp_path / "ptq", section=section, heldout=heldout, vocabulary=260, seed=0)

    def call(out: Path) -> dict[str, torch.Tensor]:
        train_quantized(
            Student.load(teacher),
            LocalTeacher(load_model(teacher, dtype=torch.float32)),
            windows,
            ObjectiveRecipe(),
            TrainRecipe(batch_size=4, precision="float32", checkpoint_every=2),
            quantized=tmp_path / "ptq",
            section=section,
            heldout=heldout,
            folder=out,
        )
        return load_file(out / "model" / "model.safetensors")

    whole = call(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(RoundedWeights, "on_pre_optimizer_step", interrupted_at(step=5))
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "cut")
    again = call(tmp_path / "cut")
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def interrupted_at(step: int) -> Any:
    original = RoundedWeights.on_pre_optimizer_step

    def stop(self: RoundedWeights, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    return stop


def test_the_training_recipe_has_the_steps_that_the_tokens_need(
    prepared: tuple[Path, Windows, Windows],
) -> None:
    _, windows, _ = prepared
    asked = QuantizeRecipe(qat=QatRecipe(tokens=20 * len(windows) * windows.context))
    recipe = qat_section(
        asked,
        TrainRecipe(batch_size=4, evaluate_every=5, early_stop=2),
        windows.context,
        len(windows),
    )
    assert recipe.max_steps == -(-20 * len(windows) // 4)
    assert recipe.epochs * len(windows) >= recipe.max_steps * 4
    assert recipe.learning_rate == 2e-4
    assert recipe.evaluate_every is None


def test_quantization_aware_training_uses_the_same_teachers(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path, quantize={"qat": {"tokens": 200}})
    teacher = tiny.save_model(tmp_path / "teacher", seed=3)
    raw["train"]["teachers"] = [str(teacher), "teacher"]
    job = find_models(tiny.parsed(raw), tmp_path)
    learned_from: list[str] = []

    def remember(student: Student, teacher: SeveralTeachers, *_: Any, **more: Any) -> None:
        learned_from.extend(each.described for each in teacher.teachers)
        raise KeyboardInterrupt

    tiny.save_model(tmp_path / "model")
    stage = Stage("train", tmp_path, "", Cost(), {}, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage, "open_data", lambda _: (None, None))
        patch.setattr(stages, "train_quantized", remember)
        plan = stages.plan_quantized_training(job, stage, stage, stage, None)
        with pytest.raises(KeyboardInterrupt):
            plan.work(tmp_path / "out")
    assert learned_from == [str(teacher), str(tmp_path / "teacher")]
    assert len(plan.inputs["teachers"]) == 2


def test_a_tokenizer_with_custom_code_is_loaded_like_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny.save_model(tmp_path / "student")
    loaded: list[AnyModel] = []

    def remember(model: AnyModel) -> Any:
        loaded.append(model)
        return tiny.tokenizer()

    module = sys.modules["stillhouse.quantize.quantize"]  # hidden by the function of the same name
    monkeypatch.setattr(module, "load_tokenizer", remember)
    model = load_model(student, dtype=torch.float32)
    quantization = Quantization(Grid(4, 32), False, {})
    source = ModelSource(student, trusted=True)
    module._save(model, quantization, source, tmp_path / "out")
    assert loaded == [source]


def test_the_rounded_student_generates_the_rollouts(
    prepared: tuple[Path, Windows, Windows], tmp_path: Path
) -> None:
    """The text is the same as that of the quantized model after training."""
    folder, windows, _ = prepared
    grid = Grid(4, 32)
    model = tiny.llama(seed=5)
    scales = scales_of(model, find_units(model, grid), grid)
    exact = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(
        Student(model, tiny.tokenizer()),
        LocalTeacher(load_model(folder, dtype=torch.float32), tiny.tokenizer()),
        windows,
        ObjectiveRecipe(),
        TrainRecipe.model_validate(
            {
                "batch_size": 4,
                "max_steps": 1,
                "learning_rate": 1e-12,
                "precision": "float32",
                "on_policy": {"share": 1.0, "max_tokens": 8, "temperature": 0.0},
            }
        ),
        folder=tmp_path,
        callbacks=[RoundedWeights(Quantization(grid, False, scales))],
        prompts=OwnPrompts.of([[5, 6, 7, 8], [9, 10, 11]]),
    )
    for name, value in model.named_parameters():
        assert torch.allclose(value, exact[name], atol=1e-9), (
            name
        )  # the latent weights are restored
    rounded = tiny.llama(seed=5)
    for name, value in rounded.named_parameters():
        if name in scales:
            value.data.copy_(on_grid(value.detach(), scales[name], grid))
    rollouts = read_rollouts(window_folder(tmp_path, 0))
    assert rollouts
    for rollout in rollouts:
        prompt = torch.tensor([rollout.ids[: rollout.given]])
        for writer, same in ((rounded, True), (tiny.llama(seed=5), False)):
            found = writer.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
            assert (found.tolist()[: len(rollout.ids)] == list(rollout.ids)) is same
