"""Training sharded over processes (with gloo) gives the weights of one process."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers.distributed import fsdp

from stillhouse.objectives.objective_config import (
    AttentionRelationsTerm,
    HiddenStatesTerm,
    LogitsTerm,
    ObjectiveRecipe,
)
from stillhouse.students.student import Student
from stillhouse.teachers import sharded_teacher
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.several_teachers import SeveralTeachers
from stillhouse.teachers.sharded_teacher import load_sharded_teacher
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.sharded_checkpoint import SHARDED
from stillhouse.training.train import shards, train
from stillhouse.training.train_config import TrainRecipe
from tests import forks, tiny
from tests.sampled import sampled
from tests.teachers import toys
from tests.training.conftest import Setting

pytestmark = pytest.mark.run

KL = ObjectiveRecipe()
HIDDEN = ObjectiveRecipe(terms=[LogitsTerm(), HiddenStatesTerm(kind="hidden_states", weight=0.1)])


def teacher_for(setting: Setting, settings: TrainRecipe) -> Teacher | None:
    if setting.teacher is None or shards(settings, "teacher") == 1:
        return setting.load_teacher()
    source = resolve_model(str(setting.teacher), base=Path.cwd())
    over = shards(settings, "teacher")
    offload = settings.offload_teacher
    return load_sharded_teacher(source, dtype=torch.float32, shards=over, offload=offload)


def starting_student(setting: Setting, settings: TrainRecipe) -> Student:
    """Loads the student as a recipe does: if sharded, each process reads only its part."""
    if shards(settings, "student") > 1 and not settings.freeze_head:
        return Student.without_weights(setting.student)
    return Student.load(setting.student)


def training_section(changes: Mapping[str, Any]) -> TrainRecipe:
    """Gradients are not clipped, because their norm over shards may differ in the last bit."""
    options: dict[str, Any] = {
        "batch_size": 8,
        "precision": "float32",
        "max_steps": 4,
        "max_grad_norm": 100,
    }
    return TrainRecipe.model_validate({**options, **changes})


def run(setting: Setting, out: Path, objective: ObjectiveRecipe = KL, **changes: Any) -> None:
    settings = training_section(changes)
    train(
        starting_student(setting, settings),
        teacher_for(setting, settings),
        setting.windows,
        objective,
        settings,
        heldout=setting.heldout,
        folder=out,
    )


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def in_processes(
    count: int,
    setting: Setting,
    out: Path,
    *args: Any,
    nodes: int = 1,
    **changes: Any,
) -> None:
    for rank in forks.ranks(count, partial(run, setting, out, *args, **changes), nodes=nodes):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]


def difference(left: Path, right: Path) -> float:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@sampled(
    "shard, objective",
    {name: name for name in ("none", "student", "teacher", "both")},
    {"kl": KL, "hidden": HIDDEN},
    fast=["none-kl", "student-kl", "teacher-hidden", "both-hidden"],
)
def test_two_processes_give_the_weights_of_one_bit_for_bit(
    narrow: Setting, tmp_path: Path, shard: str, objective: ObjectiveRecipe
) -> None:
    """One process uses micro-batches as large as the two processes', so that sums are the same.

    Under FSDP2, gradients that reach a layer from above and from a term on its output are summed
    in a different order.
    """
    options: dict[str, Any] = {"evaluate_every": 2, "checkpoint_every": 3}
    run(narrow, tmp_path / "one", objective, micro_batch_size=4, **options)
    in_processes(2, narrow, tmp_path / "two", objective, shard=shard, **options)
    reordered = objective is HIDDEN and shard in ("student", "both")
    assert difference(tmp_path / "two", tmp_path / "one") <= (1e-7 if reordered else 0)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "grad_norm", "heldout_kl"):
        values = [[row[key] for row in rows if key in row] for rows in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key


def run_offloaded(setting: Setting, out: Path, **changes: Any) -> None:
    """Uses FSDP2's offload policy for a GPU, but without pinned memory, which needs CUDA."""
    forks.patch(fsdp, "CPUOffloadPolicy", partial(CPUOffloadPolicy, pin_memory=False))
    forks.patch(sharded_teacher, "default_device", lambda: torch.device("cuda"))

    def load(*args: Any, **more: Any) -> Any:
        model = load_model(*args, **more)
        units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
        policies = [unit._get_fsdp_state()._fsdp_param_group.offload_policy for unit in units]
        assert policies
        assert all(isinstance(policy, CPUOffloadPolicy) for policy in policies)
        return model

    forks.patch(sharded_teacher, "load_model", load)
    run(setting, out, offload_teacher=True, **changes)


def test_an_offloaded_teacher_gives_the_same_weights(narrow: Setting, tmp_path: Path) -> None:
    run(narrow, tmp_path / "one", micro_batch_size=4)
    for rank in forks.ranks(2, partial(run_offloaded, narrow, tmp_path / "two", shard="both")):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]
    assert difference(tmp_path / "two", tmp_path / "one") == 0


@pytest.mark.parametrize(
    ("tied", "freeze_head"),
    [
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_evaluation_does_not_affect_how_heads_are_trained(
    setting: Setting, tmp_path: Path, tied: bool, freeze_head: bool
) -> None:
    """Weights that an evaluation left gathered would be those of the previous step."""
    student = tiny.save_model(tmp_path / "student", seed=1, tie_word_embeddings=tied)
    changed = replace(setting, student=student)
    options: dict[str, Any] = {
        "evaluate_every": 1,
        "freeze_head": freeze_head,
        "learning_rate": 1e-2,
    }
    run(changed, tmp_path / "one", micro_batch_size=4, **options)
    in_processes(2, changed, tmp_path / "two", shard="both", **options)
    assert difference(tmp_path / "two", tmp_path / "one") == 0


def test_bfloat16_products_of_sharded_and_complete_weights_are_equal(
    setting: Setting, tmp_path: Path
) -> None:
    run(setting, tmp_path / "one", micro_batch_size=4, precision="bfloat16")
    in_processes(2, setting, tmp_path / "two", shard="student", precision="bfloat16")
    assert difference(tmp_path / "two", tmp_path / "one") == 0


def run_under_two(setting: Setting, second: Path, out: Path, **changes: Any) -> None:
    settings = training_section(changes)
    teachers = [
        teacher_for(replace(setting, teacher=each), settings) for each in (setting.teacher, second)
    ]
    train(
        starting_student(setting, settings),
        SeveralTeachers([each for each in teachers if each is not None]),
        setting.windows,
        KL,
        settings,
        folder=out,
    )


def test_two_sharded_teachers_give_the_weights_of_one_process(
    narrow: Setting, tmp_path: Path
) -> None:
    second = tiny.save_model(tmp_path / "second", seed=5)
    run_under_two(narrow, second, tmp_path / "one", micro_batch_size=4)
    work = partial(run_under_two, narrow, second, tmp_path / "two", shard="both")
    for rank in forks.ranks(2, work):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1][-3000:]
    assert difference(tmp_path / "two", tmp_path / "one") == 0
    run(narrow, tmp_path / "under one", micro_batch_size=4)
    assert difference(tmp_path / "under one", tmp_path / "one") > 0


COMPACT: dict[str, dict[str, str]] = {
    "8 bits": {"optimizer": "adamw_8bit"},
    "bfloat16": {"weights": "bfloat16"},
    "both": {"weights": "bfloat16", "optimizer": "adamw_8bit"},
    "Muon": {"optimizer": "muon"},
    "Muon, bfloat16": {"weights": "bfloat16", "optimizer": "muon"},
}


@sampled(
    "shard, options",
    {"student": "student", "none": "none"},
    COMPACT,
    fast=["student-both", "student-Muon", "none-both", "none-Muon, bfloat16"],
)
def test_compact_weights_and_moments_match_one_process(
    narrow: Setting, tmp_path: Path, shard: str, options: dict[str, Any]
) -> None:
    """Blocks of moments and the noise of rounding do not depend on how weights are sharded."""
    options = {"precision": "auto", "learning_rate": 1e-3, **options}
    run(narrow, tmp_path / "one", micro_batch_size=4, **options)
    in_processes(2, narrow, tmp_path / "two", shard=shard, **options)
    dtype = getattr(torch, str(options.get("weights", "float32")))
    assert {each.dtype for each in weights(tmp_path / "two").values()} == {dtype}
    assert difference(tmp_path / "two", tmp_path / "one") == 0


def test_muon_updates_stacks_of_experts_as_in_one_process(narrow: Setting, tmp_path: Path) -> None:
    """Each process has complete matrices of a stack: here two and one of three experts."""
    toys.tiny_model("qwen3_moe", num_experts=3, vocab_size=len(tiny.tokenizer())).save_pretrained(
        tmp_path / "student"
    )
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    mixture = replace(narrow, student=tmp_path / "student")
    options: dict[str, Any] = {"optimizer": "muon", "learning_rate": 1e-3, "max_steps": 2}
    run(mixture, tmp_path / "one", micro_batch_size=4, **options)
    in_processes(2, mixture, tmp_path / "two", shard="student", **options)
    assert difference(tmp_path / "two", tmp_path / "one") < 1e-6


CLIPPED: dict[str, Any] = {"max_grad_norm": 0.01, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("processes", "nodes", "options"),
    [
        (2, 1, {"micro_batch_size": 1}),
        (2, 1, CLIPPED),
        pytest.param(4, 1, {}, marks=pytest.mark.slow),
        pytest.param(4, 2, {"shard_within": "node"}, marks=pytest.mark.slow),
        (4, 4, {"shard_within": "node"}),
    ],
    ids=["accumulated", "clipped", "four", "two nodes", "four nodes"],
)
def test_other_numbers_of_processes_differ_only_in_rounding(
    setting: Setting, tmp_path: Path, processes: int, nodes: int, options: dict[str, Any]
) -> None:
    """The difference is at most a hundredth of AdamW's steps of 1e-4, also after an epoch's end.

    With 94 windows in batches of 8, one of four processes has no row in an epoch's last step.
    """
    common: dict[str, Any] = {"epochs": 2, "max_steps": 14, "schedule": "constant", **options}
    run(setting, tmp_path / "one", **common)
    in_processes(processes, setting, tmp_path / "many", shard="both", nodes=nodes, **common)
    assert difference(tmp_path / "many", tmp_path / "one") < 1e-6


def test_a_sharded_teacher_scores_several_micro_batches_in_one_pass(
    narrow: Setting, tmp_path: Path
) -> None:
    """The teacher scores two micro-batches in one pass; each then gets its rows."""
    relations = AttentionRelationsTerm(kind="attention_relations", heads=2, weight=0.1)
    objective = ObjectiveRecipe(terms=[*HIDDEN.terms, relations])
    options: dict[str, Any] = {"micro_batch_size": 1, "max_steps": 2}
    run(narrow, tmp_path / "one", objective, **options)
    in_processes(2, narrow, tmp_path / "two", objective, shard="teacher", **options)
    assert difference(tmp_path / "two", tmp_path / "one") < 1e-6


DIVIDED, PLAIN, ALONE = (2, "both"), (2, "none"), (1, "auto")
LAUNCHES = {"sharded": DIVIDED, "plain": PLAIN, "alone": ALONE}


@sampled(
    "before, after",
    LAUNCHES,
    LAUNCHES,
    fast=["sharded-sharded", "sharded-plain", "plain-alone", "alone-sharded"],
)
def test_training_resumes_with_other_processes_and_sharding(
    narrow: Setting, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    options: dict[str, Any] = {"checkpoint_every": 2, "keep_checkpoints": 3, "schedule": "constant"}
    run(narrow, tmp_path / "one", HIDDEN, max_steps=6, **options)
    for steps, (processes, shard) in ((4, before), (6, after)):
        more: dict[str, Any] = {"max_steps": steps, "shard": shard, **options}
        if processes == 1:
            run(narrow, tmp_path / "many", HIDDEN, **more)
        else:
            in_processes(processes, narrow, tmp_path / "many", HIDDEN, **more)
    assert difference(tmp_path / "many", tmp_path / "one") < 1e-6
    done = [row["step"] for row in read_metrics(tmp_path / "many" / "metrics.jsonl")]
    assert done == [1, 2, 3, 4, 5, 6]


@sampled(
    "before, after",
    {"sharded": DIVIDED, "alone": ALONE},
    {"sharded": DIVIDED, "alone": ALONE},
    fast=["sharded-sharded", "sharded-alone"],
)
def test_compact_training_resumes_bit_for_bit_with_other_sharding(
    narrow: Setting, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    """A step has two windows, whose gradients are summed identically in one and two processes."""
    options: dict[str, Any] = {"checkpoint_every": 2, "keep_checkpoints": 3, "schedule": "constant"}
    options |= {"weights": "bfloat16", "precision": "auto", "optimizer": "adamw_8bit"}
    options |= {"micro_batch_size": 1, "batch_size": 2, "learning_rate": 1e-3}
    run(narrow, tmp_path / "one", max_steps=4, **options)
    for steps, (processes, shard) in ((2, before), (4, after)):
        more: dict[str, Any] = {"max_steps": steps, **options}
        if processes == 1:
            run(narrow, tmp_path / "many", **more)
        else:
            in_processes(processes, narrow, tmp_path / "many", shard=shard, **more)
    assert difference(tmp_path / "many", tmp_path / "one") == 0


SHORT: dict[str, Any] = {
    "checkpoint_every": 2,
    "keep_checkpoints": 3,
    "max_steps": 8,
    "micro_batch_size": 2,
    "schedule": "constant",
}


def test_training_resumes_bit_for_bit_after_killed_processes(
    narrow: Setting, tmp_path: Path
) -> None:
    """One is killed while a checkpoint is written, another between two; then the run resumes."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    in_processes(2, narrow, undisturbed, HIDDEN, shard="both", **SHORT)
    for step, victim in ((2, 1), (6, 0)):
        work = partial(run, narrow, killed, HIDDEN, shard="both", **SHORT)
        processes = forks.ranks(2, work)
        while not (killed / "checkpoints" / f"checkpoint-{step}").exists():
            assert processes[victim].poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        processes[victim].send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(timeout=60)
    in_processes(2, narrow, killed, HIDDEN, shard="both", **SHORT)
    assert difference(killed, undisturbed) == 0


def test_a_checkpoint_with_a_damaged_shard_is_set_aside(narrow: Setting, tmp_path: Path) -> None:
    undisturbed, damaged = tmp_path / "undisturbed", tmp_path / "damaged"
    in_processes(2, narrow, undisturbed, shard="both", **SHORT)
    in_processes(2, narrow, damaged, shard="both", **{**SHORT, "max_steps": 6})
    (part, _) = sorted((damaged / "checkpoints" / "checkpoint-6" / SHARDED).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    in_processes(2, narrow, damaged, shard="both", **SHORT)
    assert (damaged / "checkpoints" / "damaged-checkpoint-6").is_dir()
    assert difference(damaged, undisturbed) == 0
