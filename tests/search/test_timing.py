"""The times of blocks add up to that of a model's step, and memory is linear in weight bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.pruning.pruning_config import SearchRecipe, TargetRecipe
from stillhouse.pruning.shapes import Counter, combinations
from stillhouse.pruning.sizes import sizes_of
from stillhouse.search import block_timing as timing
from stillhouse.search.block_timing import (
    LatencyTable,
    MemoryLine,
    Timing,
    shapes_to_time,
    time_shape,
    timed_widths,
)
from stillhouse.search.shape_costs import costs_of
from stillhouse.search.trial_log import Journal
from tests.clocks import Clock
from tests.teachers.toys import CONFIGS


def test_times_of_blocks_are_interpolated_and_add_up() -> None:
    rows = [
        Timing(32, 4, 2, 64, 3, attention=2.0, ffn=6.0, rest=0.5, ends=10.0),
        Timing(32, 2, 2, 32, 3, attention=1.0, ffn=4.0, rest=0.5, ends=10.0),
    ]
    table = LatencyTable(tuple(rows))
    start = sizes_of(CONFIGS["llama"]())
    assert table.seconds(start) == pytest.approx(10 + 3 * 8.5)
    between = replace(start, layers=2, heads=2, ffn_size=48)
    assert table.seconds(between) == pytest.approx(10 + 2 * (1 + 5 + 0.5))
    assert table.seconds(replace(start, ffn_size=16)) == pytest.approx(10 + 3 * (2 + 3 + 0.5))


def test_all_attention_sizes_and_a_few_ffn_sizes_are_timed() -> None:
    search = SearchRecipe(multiple_of=8)
    config = CONFIGS["llama"]()
    possible = list(combinations(config, search))
    timed = shapes_to_time(possible, timed_widths(64, 16))
    pairs = {(shape.hidden_size, shape.heads, shape.kv_heads) for shape in possible}
    assert {(shape.hidden_size, shape.heads, shape.kv_heads) for shape in timed} == pairs
    for hidden in {shape.hidden_size for shape in possible}:
        widths = {shape.ffn_size for shape in timed if shape.hidden_size == hidden}
        assert {16, 32, 48, 64} == widths
    assert len(timed) < len(possible)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_the_predicted_time_of_a_step_is_the_sum_of_its_timed_blocks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a clock on which every reading is a second later than the previous one."""
    monkeypatch.setattr(timing, "time", Clock(tick=1.0))
    config = CONFIGS[kind](num_hidden_layers=4)
    start = sizes_of(config)
    shapes = [start, replace(start, ffn_size=start.ffn_size // 2)]
    rows = [time_shape(config, shape, torch.float32) for shape in shapes]
    whole = rows[0].ends + rows[0].layers * (rows[0].attention + rows[0].ffn + rows[0].rest)
    predicted = LatencyTable(tuple(rows)).seconds(start)
    assert predicted == pytest.approx(whole)
    assert all(value > 0 for value in (rows[0].attention, rows[0].ffn))
    half = LatencyTable(tuple(rows)).seconds(replace(start, layers=2))
    assert half < predicted


def costs(folder: Path, **target: Any) -> Any:
    config = CONFIGS["llama"]()
    search = SearchRecipe(axes=["layers", "ffn_size"], multiple_of=8)
    journal = Journal(folder / "journal.json")
    return costs_of(
        config,
        Counter(config),
        search,
        TargetRecipe(**target),
        torch.float32,
        torch.device("cpu"),
        journal,
    )


def test_latency_is_measured_once(tmp_path: Path) -> None:
    first = costs(tmp_path, decode_latency="60%")
    start = sizes_of(CONFIGS["llama"]())
    assert first.limit.most == pytest.approx(0.6 * first.of(start))
    assert first.of(replace(start, layers=1)) < first.of(start)
    again = costs(tmp_path, decode_latency="60%")
    assert again.measured == first.measured


def test_memory_is_linear_in_the_bytes_of_the_weights(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.json").once("memory", lambda: {"base": 1000.0, "factor": 2.0})
    found = costs(tmp_path, memory="60%")
    config = CONFIGS["llama"]()
    weights = 4 * Counter(config).total(sizes_of(config))
    assert (
        found.of(sizes_of(config)) == MemoryLine(1000.0, 2.0).bytes(weights) == 1000 + 2 * weights
    )


@pytest.mark.run
def test_a_failed_memory_measurement_proposes_a_target_that_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "random_like", lambda *_: SimpleNamespace(save_pretrained=Path))
    with pytest.raises(ModelError, match="measures the model's memory failed") as caught:
        timing.measure_memory(CONFIGS["llama"](), torch.float32, "cpu")
    assert "student.target.bytes" in str(caught.value.fix)
