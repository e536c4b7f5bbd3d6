"""The memory of a training step is calculated from sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from stillhouse.planning.loss_memory import loss_sizes
from stillhouse.planning.model_size import config_size
from stillhouse.planning.step_memory import (
    COMPILED_BYTES,
    HEAP_GAPS,
    Memory,
    Shard,
    Step,
    fitting_shard,
    training_memory,
    training_phases,
)
from stillhouse.planning.training_step import training_step
from tests.planning.shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B

pytestmark = pytest.mark.run
GB = 1e9
EIGHT: dict[str, Any] = {"over": 8, "processes": 8}


@pytest.fixture(scope="module")
def step() -> Step:
    """70B to 8B, with 8,192 tokens per micro-batch and several micro-batches per step."""
    return training_step(
        LLAMA_8B,
        [LLAMA_70B],
        windows=1,
        context=8192,
        accumulates=True,
        compute=torch.bfloat16,
        device="cuda",
        checkpointing=True,
    )


def test_parameters_are_those_of_the_model_cards() -> None:
    large, small = config_size(LLAMA_70B), config_size(LLAMA_8B)
    assert large.parameters == 70_553_706_496
    assert small.parameters == 8_030_261_248
    assert small.layer == 218_112_000
    assert small.ends == 2 * 128256 * 4096


def parts(step: Step, shard: Shard) -> dict[str, float]:
    """The maximum of each part over all phases, in GB."""
    found: dict[str, float] = {}
    for memory in training_phases(step, shard, **EIGHT):
        for part, size in memory.parts.items():
            found[part] = max(found.get(part, 0), size / GB)
    return found


def test_memory_of_70b_to_8b_unsharded(step: Step) -> None:
    """327 GB per process: the student's weights, gradients, moments, and DDP buckets in float32,
    the teacher in bfloat16, and the memory of a micro-batch."""
    memory = training_memory(step, "none", **EIGHT)
    assert memory.phase == "loss"
    assert memory.total / GB == pytest.approx(327, rel=0.01)
    assert memory.parts["DDP buckets"] == memory.parts["gradients"] == 4 * 8_030_261_248


def test_memory_of_70b_to_8b_with_both_models_sharded_over_8(step: Step) -> None:
    found = parts(step, "both")
    assert found["student weights"] == pytest.approx(4.0, abs=0.05)
    assert found["gradients"] == pytest.approx(4.0, abs=0.05)
    assert found["moments"] == pytest.approx(8.0, abs=0.05)
    assert found["teacher"] == pytest.approx(17.6, abs=0.05)
    assert found["gathered teacher"] == pytest.approx(7.6, abs=0.05)
    assert found["reduce buffers"] == pytest.approx(4.2, abs=0.05)  # of embeddings and LM head
    assert found["loss"] == pytest.approx(4.6, rel=0.01)
    memory = training_memory(step, "both", **EIGHT)
    # The phases do not need all of this at once.
    assert memory.total < sum(found.values()) * GB
    assert memory.fits(80 * GB)


def test_the_fastest_shard_that_fits_is_chosen(step: Step) -> None:
    assert fitting_shard(step, 400 * GB, **EIGHT) == "none"
    assert fitting_shard(step, 250 * GB, **EIGHT) == "teacher"
    assert fitting_shard(step, 190 * GB, **EIGHT) == "student"
    assert fitting_shard(step, 80 * GB, **EIGHT) == "both"
    assert fitting_shard(step, 40 * GB, **EIGHT) is None
    assert fitting_shard(step, 250 * GB, **EIGHT, student=False) == "teacher"
    assert fitting_shard(step, 190 * GB, **EIGHT, student=False) is None
    assert fitting_shard(step, 80 * GB, over=1, processes=1) is None


def test_estimates_have_a_margin_in_both_directions() -> None:
    memory = Memory("loss", {"student weights": 100.0})
    assert memory.fits(110.1)
    assert not memory.fits(109)
    assert not memory.cannot_fit(91)
    assert memory.cannot_fit(89)


def test_an_8b_student_fits_on_one_gpu_with_bfloat16_weights_and_8_bit_moments() -> None:
    """Two bytes per parameter for each of weights, gradients, and moments, instead of 16 in all."""
    options: dict[str, Any] = {
        "windows": 1,
        "context": 4096,
        "accumulates": True,
        "checkpointing": True,
    }
    common: dict[str, Any] = {**options, "compute": torch.bfloat16, "device": "cuda"}
    usual = training_step(LLAMA_8B, [], **common, gathered=torch.float32)
    small = training_step(
        LLAMA_8B,
        [],
        **common,
        weights=torch.bfloat16,
        gathered=torch.bfloat16,
        optimizer="adamw_8bit",
    )
    alone = {"over": 1, "processes": 1}
    assert not training_memory(usual, "none", **alone).fits(128 * GB)
    memory = training_memory(small, "none", **alone)
    assert memory.fits(80 * GB)
    found = {part: size / 8_030_261_248 for part, size in memory.parts.items()}
    assert found["student weights"] == found["gradients"] == 2
    assert found["moments"] == pytest.approx(2, rel=0.02)
    assert "DDP buckets" not in training_memory(small, "none", **EIGHT).parts


def test_muon_keeps_one_moment_of_matrices_and_two_of_embeddings_and_head() -> None:
    options: dict[str, Any] = {"windows": 1, "context": 512, "accumulates": True}
    step = training_step(
        LLAMA_8B, [], **options, compute=torch.bfloat16, device="cuda", optimizer="muon"
    )
    found = training_memory(step, "none", over=1, processes=1).parts["moments"]
    ends = 2 * 128_256 * 4096
    assert found == pytest.approx(4 * (8_030_261_248 - ends) + 8 * ends)


SMALL = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 2}


def on_a_cpu(teacher: Any) -> Step:
    return training_step(
        LlamaConfig(intermediate_size=512, **SMALL),
        [teacher],
        windows=2,
        context=64,
        accumulates=True,
        compute=torch.float32,
        device="cpu",
    )


def test_on_a_cpu_the_heap_has_gaps_in_each_phase() -> None:
    for memory in training_phases(on_a_cpu(LlamaConfig(**SMALL)), "none", over=1, processes=1):
        parts = dict(memory.parts)
        gaps = parts.pop("heap")
        assert gaps == pytest.approx(HEAP_GAPS * (sum(parts.values()) - parts["context"]))
        assert "compiled products" not in parts


def test_on_a_cpu_a_mixture_of_experts_needs_memory_for_compiled_products() -> None:
    teacher = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **SMALL)
    found = training_memory(on_a_cpu(teacher), "none", over=1, processes=1)
    assert found.parts["compiled products"] == COMPILED_BYTES


def test_the_head_is_copied_for_products_in_a_different_dtype() -> None:
    tiles = [
        loss_sizes(
            64,
            128256,
            4096,
            (),
            compute=torch.bfloat16,
            device="cuda",
            kernels=True,
            only_kl=True,
            trained_head=True,
            copies_head=copies_head,
        ).tiles
        for copies_head in (False, True)
    ]
    assert tiles[1] - tiles[0] == 128256 * 4096 * 2
    common: dict[str, Any] = {"windows": 1, "context": 64, "accumulates": True, "device": "cuda"}
    sizes = [
        training_step(LLAMA_1B, [], compute=torch.bfloat16, weights=weights, **common).loss.tiles
        for weights in (torch.bfloat16, torch.float32)
    ]
    assert sizes[1] - sizes[0] == 128256 * 2048 * 2
