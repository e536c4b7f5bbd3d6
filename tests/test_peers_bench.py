"""The comparisons with other tools, tested without those tools: rankings, rates, bars, and runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import common, peer_pruning, peers
from bench.peer_own import Chunks
from bench.peer_runs import TrainingJob, largest_difference, summarize
from bench.peer_trainers import collate
from bench.peers import bars

from stillhouse.data.windows import ARRAYS
from tests import tiny


def norms_of(model: Any, layer: int) -> torch.Tensor:
    """The squared norm of each neuron's weights, one neuron at a time, [F]."""
    ffn = model.model.layers[layer].mlp
    found = []
    for neuron in range(len(ffn.gate_proj.weight)):
        parts = ffn.gate_proj.weight[neuron], ffn.up_proj.weight[neuron]
        found.append(sum(w.square().sum() for w in (*parts, ffn.down_proj.weight[:, neuron])))
    return torch.stack(found)


def test_magnitude_keeps_the_neurons_with_the_largest_weights() -> None:
    model, original = tiny.llama(), tiny.llama()
    peer_pruning.cut_plainly(model, 24, peer_pruning.squared)
    for number, layer in enumerate(model.model.layers):
        kept = norms_of(original, number).topk(24).indices.sort().values
        ffn = original.model.layers[number].mlp
        assert torch.equal(layer.mlp.gate_proj.weight, ffn.gate_proj.weight[kept])
        assert torch.equal(layer.mlp.down_proj.weight, ffn.down_proj.weight[:, kept])
    assert model.config.intermediate_size == 24
    model(input_ids=torch.arange(8)[None])


def test_taylor_ranks_by_weight_times_gradient() -> None:
    model = tiny.llama()
    windows = Chunks(np.arange(64).reshape(4, 16))
    peer_pruning.add_gradients(model, windows)
    layer = model.model.layers[1]
    scores = peer_pruning.neuron_scores(layer, peer_pruning.first_order)
    ffn, neuron = layer.mlp, 5
    by_hand = sum(
        float((weight.detach()[index] * weight.grad[index]).abs().sum())
        for weight, index in (
            (ffn.gate_proj.weight, neuron),
            (ffn.up_proj.weight, neuron),
            (ffn.down_proj.weight, (slice(None), neuron)),
        )
    )
    assert float(scores[neuron]) == pytest.approx(by_hand, rel=1e-4)


def test_all_contenders_learn_the_same_tokens() -> None:
    rows = np.arange(40).reshape(5, 8)
    windows = Chunks(rows)
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    for number in range(5):
        row = windows[number]
        assert set(row) == set(ARRAYS)
        assert torch.equal(row["input_ids"], batch["input_ids"][number])
        assert torch.equal(row["labels"], batch["labels"][number])
    assert windows.supervised_tokens == int((batch["labels"] != -100).sum()) == 35


def test_the_rate_is_that_of_the_median_step(tmp_path: Path) -> None:
    np.save(tmp_path / "windows.npy", np.zeros((8, 11), dtype=np.int64))
    job = TrainingJob("", "", str(tmp_path / "windows.npy"), "", 5, 2, 2, 1e-4, 2, 1)
    times = [0.0, 9.0, 10.0, 12.0, 14.0]  # the first two steps are not timed
    lines = [
        {"began": -1.0},
        *({"step": n + 1, "at": at, "cpu": at / 2} for n, at in enumerate(times)),
    ]
    lines += [{"ended": 14.5, "training_peak": 7}, {"whole_peak": 9}]
    found = summarize(lines, job)
    assert found.tokens_per_s == 2 * 10 / 2.0
    assert found.tokens_per_cpu_s == 2 * 10 / 1.0
    assert (found.seconds, found.training_peak_bytes, found.whole_peak_bytes) == (15.5, 7, 9)
    assert found.steps == 5
    assert summarize([], job).tokens_per_s == 0.0


def test_bars_compare_with_the_fastest_and_the_best_peer() -> None:
    def contender(rate: float, peak: int, kl: float) -> dict[str, object]:
        return {"rounds": [{"tokens_per_cpu_s": rate, "training_peak_bytes": peak}], "kl": kl}

    found = {
        "stillhouse": contender(130.0, 30, 0.5),
        "huggingface": contender(100.0, 60, 0.6),
        "trl_gkd": contender(50.0, 10, 0.4),
    }
    assert [round(bar.value, 3) for bar in bars(found)] == [1.3, 0.5, 0.1]
    assert bars({"stillhouse": found["stillhouse"]}) == []


def test_the_largest_difference_between_two_models(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "a")
    tiny.save_model(tmp_path / "b")
    tiny.save_model(tmp_path / "c", seed=1)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0.0
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0.1


@pytest.mark.slow
def test_training_is_compared_with_transformers_and_resumed_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.recipe(tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    arguments = [str(tmp_path / "text.txt"), "--python", sys.executable]
    arguments += ["--teacher", str(tmp_path / "teacher"), "--ffn-size", "32", "--steps", "6"]
    arguments += ["--context", "32", "--rounds", "1", "--heldout-windows", "4", "--threads", "1"]
    arguments += ["--kinds", "stillhouse", "huggingface"]
    monkeypatch.setattr(sys, "argv", ["bench.peers", *arguments])
    peers.main()
    figures = json.loads((tmp_path / "results" / "peers.json").read_text())["figures"]
    own, other = figures["contenders"]["stillhouse"], figures["contenders"]["huggingface"]
    for kind in (own, other):
        assert kind["rounds"][0]["error"] == ""
        assert kind["rounds"][0]["steps"] == 6
        assert kind["rounds"][0]["tokens_per_s"] > 0
        assert kind["kl"] > 0
    assert own["killed_between_steps"]["resumed_from"] == "checkpoint-2"
    assert own["killed_between_steps"]["difference"] == 0.0
    assert own["killed_in_a_checkpoint"]["difference"] == 0.0
    assert figures["equal_time"]["kl"] is not None
