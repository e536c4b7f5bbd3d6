"""The memory estimates for ten pairs of well-known models agree with the golden file.

`python -m tests.planning.test_golden` writes a new golden.json.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.language_model import run_plan
from stillhouse.language_model.run_models import RunModels
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import config_size
from stillhouse.planning.step_memory import SHARDS, training_memory
from stillhouse.planning.training_step import training_step
from tests import tiny
from tests.planning.shapes import (
    GEMMA3_4B,
    GEMMA3_27B,
    LLAMA_1B,
    LLAMA_3B,
    LLAMA_8B,
    LLAMA_70B,
    QWEN2_7B,
    QWEN2_32B,
    QWEN3_0_6B,
    QWEN3_1_7B,
    QWEN3_4B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    SMOLLM2_1_7B,
    SMOLLM2_1B,
)

GOLDEN = Path(__file__).parent / "golden.json"


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, and how they are trained.

    teacher: None if signals are stored.
    context: tokens of a window; a micro-batch has one window.
    processes: on nodes of 8.
    """

    teacher: Any
    student: Any
    context: int = 4096
    processes: int = 8
    checkpointing: bool = True
    accumulates: bool = True
    offload: bool = False


PAIRS = {
    "Llama 70B to 8B": Pair(LLAMA_70B, LLAMA_8B, context=8192),
    "Llama 70B to 8B on two nodes, in one micro-batch": Pair(
        LLAMA_70B, LLAMA_8B, processes=16, accumulates=False
    ),
    "Llama 70B, offloaded, to 3B": Pair(LLAMA_70B, LLAMA_3B, offload=True),
    "Llama 8B to 1B, without checkpointing": Pair(LLAMA_8B, LLAMA_1B, checkpointing=False),
    "Qwen2.5 32B to 7B": Pair(QWEN2_32B, QWEN2_7B),
    "Qwen3 8B to 4B": Pair(QWEN3_8B, QWEN3_4B, context=8192),
    "Qwen3 4B from stored signals": Pair(None, QWEN3_4B),
    "Qwen3 30B-A3B to 1.7B": Pair(QWEN3_30B_A3B, QWEN3_1_7B),
    "SmolLM2 1.7B to 1B on one GPU": Pair(SMOLLM2_1_7B, SMOLLM2_1B, context=2048, processes=1),
    "Gemma 3 27B to 4B": Pair(GEMMA3_27B, GEMMA3_4B),
}


def planned(pair: Pair) -> dict[str, Any]:
    """For every way to shard the models: the phase that needs the most, and its parts in MB."""
    step = training_step(
        pair.student,
        [] if pair.teacher is None else [pair.teacher],
        windows=1,
        context=pair.context,
        accumulates=pair.accumulates,
        compute=torch.bfloat16,
        gathered=torch.float32,
        device="cuda",
        checkpointing=pair.checkpointing,
        offload=pair.offload,
    )
    found: dict[str, Any] = {}
    for shard in SHARDS if pair.processes > 1 else SHARDS[:1]:
        memory = training_memory(step, shard, over=pair.processes, processes=pair.processes)
        parts = {name: round(size / 1e6) for name, size in memory.parts.items()}
        total = round(memory.total / 1e6)
        found[shard] = {"total": total, "phase": memory.phase, "parts": parts}
    return found


def planned_on_a_cpu(pair: Pair) -> dict[str, Any]:
    """The evaluation and the export, with a teacher that is stored and run in bfloat16."""
    raw = {
        "name": "pair",
        "teacher": {"model": "teacher"},
        "data": {"sources": [{"kind": "corpus"}], "context": pair.context},
        "student": {"start": "pretrained", "model": "student"},
        "train": {"precision": "bfloat16"},
        "evaluate": {"speed": False},
    }
    teacher = copy.deepcopy(pair.teacher)
    teacher.dtype = torch.bfloat16
    models = RunModels(
        recipe=tiny.parsed(raw),
        student=pair.student,
        start=pair.student,
        teacher=teacher,
        teachers=(teacher,),
        divergences=("forward_kl",),
        kept_layers=0,
        row_bytes=0.0,
    )
    machine = Machine("cpu", 1e13)
    found = {}
    for stage in (run_plan._evaluation(models, machine), run_plan._export(models, machine)):
        parts = {name: round(size / 1e6) for name, size in stage.memory.parts.items()}
        found[stage.name] = {"phase": stage.memory.phase, "parts": parts}
    return found


SAMPLE = (
    "Llama 70B, offloaded, to 3B",
    "Llama 8B to 1B, without checkpointing",
    "Qwen3 30B-A3B to 1.7B",
    "SmolLM2 1.7B to 1B on one GPU",
)
"""Tracing each of the others takes several seconds."""


@pytest.mark.run
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in PAIRS]
)
def test_the_plan_agrees_with_the_golden_file(name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    # Activations follow transformers' code, which may change; all else is arithmetic.
    for shard, found in planned(PAIRS[name]).items():
        expected = golden[name][shard]
        assert found["total"] == pytest.approx(expected["total"], rel=0.02)
        for part in expected["parts"].keys() - {"activations", "copies of weights"}:
            assert found["parts"][part] == pytest.approx(expected["parts"][part], abs=1), part


@pytest.mark.run
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow)
        for n, pair in PAIRS.items()
        if pair.teacher is not None
    ],
)
def test_evaluation_and_export_agree_with_the_golden_file(name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]["on a CPU"]
    for stage, found in planned_on_a_cpu(PAIRS[name]).items():
        assert found["phase"] == golden[stage]["phase"]
        for part, size in golden[stage]["parts"].items():
            tolerance = 0.02 * size if part == "activations" else 1
            assert found["parts"][part] == pytest.approx(size, abs=tolerance), part


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_3B, 3_212_749_824),
        (LLAMA_1B, 1_235_814_400),
        (QWEN2_32B, 32_763_876_352),
        (QWEN2_7B, 7_615_616_512),
        (QWEN3_8B, 8_190_735_360),
        (QWEN3_4B, 4_022_468_096),
        (QWEN3_30B_A3B, 30_532_122_624),
        (QWEN3_0_6B, 596_049_920),
        (SMOLLM2_1_7B, 1_711_376_384),
    ],
)
def test_parameters_are_those_of_the_model_cards(config: Any, parameters: int) -> None:
    assert config_size(config).parameters == parameters


def test_active_parameters_of_a_mixture_of_experts_are_those_of_one_token() -> None:
    found = config_size(QWEN3_30B_A3B)
    assert found.active / 1e9 == pytest.approx(3.3 - 0.31, abs=0.1)  # without the embeddings


if __name__ == "__main__":
    golden = {name: planned(pair) for name, pair in PAIRS.items()}
    for name, pair in PAIRS.items():
        if pair.teacher is not None:
            golden[name]["on a CPU"] = planned_on_a_cpu(pair)
    text = json.dumps(golden, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
