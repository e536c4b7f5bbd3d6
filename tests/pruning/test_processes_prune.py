"""Several processes prune to the same weights as one, bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.pruning import offload, vocabulary_cut
from stillhouse.pruning import prune as prune_module
from stillhouse.pruning.calibrate import OwnBatches, calibration_batches
from stillhouse.pruning.offload import load_offloaded, shared_layers
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.pruning_config import PruningMethod
from stillhouse.pruning.vocabulary_cut import expected_tokens
from stillhouse.shared_work import ALONE, Processes, all_processes
from tests import forks
from tests.teachers.toys import ToyWindows, save_model, tiny_model

pytestmark = pytest.mark.run

CUTS: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_size": 24, "local_tokens": 500},
    "all": {"layers": 2, "hidden_size": 24, "heads": 2, "ffn_size": 24},
    "rotation": {"hidden_size": 24, "hidden_method": "rotation"},
    "gradients": {
        "layers": 2,
        "heads": 2,
        "ffn_size": 24,
        "method": PruningMethod(importance="gradients", depth_importance="gradients"),
    },
    "gemma2": {"kind": "gemma2", "layers": 2, "hidden_size": 24, "ffn_size": 24},
    "experts": {"kind": "qwen3_moe", "experts": 2, "ffn_size": 8},
}
"""Together, they use every statistic: of streams, heads, neurons, experts, gains, and gradients."""


def small_batches(
    windows: Any,
    tokens: int,
    seed: int,
    device: Any = "cpu",
    together: int = 64,
    processes: Processes = ALONE,
) -> OwnBatches:
    """Seven batches: six of two windows, and the last of one."""
    return calibration_batches(windows, tokens, seed, device, 64, processes)


def prune(out: Path) -> None:
    forks.patch(prune_module, "calibration_batches", small_batches)
    forks.patch(vocabulary_cut, "calibration_batches", small_batches)
    processes = all_processes()
    for name in CUTS:
        options = dict(CUTS[name])
        model = tiny_model(options.pop("kind", "llama"), num_hidden_layers=3)
        windows = ToyWindows(count=13, padding=3)
        expected_V = expected_tokens(model, windows, 500, 0, torch.float32, processes)
        report = prune_model(model, windows, processes=processes, **options)
        found = {"report": asdict(report), "expected": expected_V, "weights": model.state_dict()}
        torch.save(found, out / f"{name}-{processes.own}-of-{processes.count}")


LARGE = {name: CUTS[name] for name in ("ffn", "all", "rotation")}


def prune_large(start: Path, out: Path) -> None:
    """Prunes the same model several times. The processes share its files, which do not change."""
    forks.patch(prune_module, "calibration_batches", small_batches)
    offload.LARGE_BYTES = 0
    processes = all_processes()
    values: dict[str, bytes] = {}
    with shared_layers(start, processes):
        for name, options in LARGE.items():
            model = load_offloaded(start)
            files = [
                str(weight.untyped_storage().filename)
                for layer in model.base_model.layers
                for weight in layer.parameters()
            ]
            if processes.count > 1:
                assert len(set(map(tuple, processes.collect(files)))) == 1
                values = values or {file: Path(file).read_bytes() for file in files}
                assert list(values) == files
            prune_model(model, ToyWindows(count=13, padding=3), processes=processes, **options)
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            torch.save(weights, out / f"{name}-{processes.own}-of-{processes.count}")
        processes.collect(None)
        assert all(Path(file).read_bytes() == value for file, value in values.items())
        processes.collect(None)
    processes.collect(None)
    assert not any(Path(file).exists() for file in values)


def test_processes_share_the_files_of_a_large_model(tmp_path: Path) -> None:
    save_model(tmp_path / "start", tiny_model("llama", num_hidden_layers=3))
    for count in (1, 2):
        for rank in forks.ranks(count, partial(prune_large, tmp_path / "start", tmp_path)):
            assert rank.wait(timeout=250) == 0, rank.communicate()[1][-3000:]
    for name in LARGE:
        one = torch.load(tmp_path / f"{name}-0-of-1")
        for own in range(2):
            many = torch.load(tmp_path / f"{name}-{own}-of-2")
            assert many.keys() == one.keys()
            assert all(torch.equal(many[key], one[key]) for key in one), name


def test_several_processes_prune_to_the_weights_of_one(tmp_path: Path) -> None:
    for count in (1, 2, 4):
        for rank in forks.ranks(count, partial(prune, tmp_path)):
            assert rank.wait(timeout=250) == 0, rank.communicate()[1][-3000:]
    for name, count in itertools.product(CUTS, (2, 4)):
        one = torch.load(tmp_path / f"{name}-0-of-1")
        for own in range(count):
            many = torch.load(tmp_path / f"{name}-{own}-of-{count}")
            assert many["report"] == one["report"], name
            assert torch.equal(many["expected"], one["expected"])
            assert many["weights"].keys() == one["weights"].keys()
            for key, weight in one["weights"].items():
                assert torch.equal(many["weights"][key], weight), (name, key)
