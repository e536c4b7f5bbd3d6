"""Signals recorded with a real vLLM equal those of a local teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse.commands import record_signals
from stillhouse.errors import ModelError
from stillhouse.generation.vllm_engine import opened_hidden_states
from stillhouse.signals.encodings import Hidden
from stillhouse.signals.manifest import read_settings
from stillhouse.signals.shards import open_shard
from stillhouse.signals.store import open_store
from stillhouse.teachers.activations import ActivationRequest, run_backbone
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import ModelSource
from stillhouse.vllm_config import VllmEngine
from tests import tiny
from tests.teachers.hidden_engine import TERMS
from tests.vllm.conftest import serving

POOLING = (
    "--runner", "pooling", "--convert", "embed",
    "--pooler-config", '{"task": "token_embed", "use_activation": false}',
)  # fmt: skip
ALIKE: dict[str, Any] = {"rtol": 2**-7, "atol": 2e-3}
"""Rows are stored in bfloat16, whose significand has 8 bits."""


def write(home: Path, name: str, **changes: Any) -> Path:
    path = home / f"{name}.yaml"
    raw = tiny.recipe(home, name=name, folder=str(home / "runs" / name), **changes)
    path.write_text(yaml.safe_dump(raw))
    return path


def hidden_rows(store: Path) -> dict[bytes, torch.Tensor]:
    """The rows of each segment, indexed by its key."""
    found: dict[bytes, torch.Tensor] = {}
    for file in (store / "shards").iterdir():
        shard = open_shard(file, read_settings(store))
        rows = torch.from_numpy(shard.rows.bits_NW.copy()).view(torch.bfloat16)
        parts = rows.split(shard.rows_S.tolist())
        found |= dict(zip(shard.keys_S, parts, strict=True))
    return found


def assert_stores_close(one: Path, other: Path) -> None:
    first, second = hidden_rows(one), hidden_rows(other)
    assert first.keys() == second.keys()
    for key, rows in first.items():
        torch.testing.assert_close(rows, second[key], **ALIKE)


def test_vllm_in_another_python_computes_the_layers_of_transformers(
    home: Path, python: str
) -> None:
    model = load_model(home / "teacher", dtype=torch.float32)
    chance = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 200, (n,), generator=chance).tolist() for n in (1, 5, 17, 200)]
    with opened_hidden_states(
        VllmEngine(python=python, dtype="float32"), ModelSource(home / "teacher"), base=home,
        layers=(0, 1, 2, 3), last=3, seed=0,
    ) as source:  # fmt: skip
        found = source.read(prompts, (0, 1, 2, 3))
    request = ActivationRequest(frozenset(range(4)))
    for prompt, layers in zip(prompts, found, strict=True):
        ids_RL = torch.tensor([prompt])
        with torch.no_grad():
            expected = run_backbone(model, ids_RL, None, request).layers
        for layer in range(4):
            torch.testing.assert_close(layers[layer], expected[layer][0], rtol=0, atol=1e-4)


def test_vllm_in_another_python_records_the_layers_of_a_local_teacher(
    home: Path, python: str
) -> None:
    encoding, vllm = {"kind": "hidden"}, {"python": python, "dtype": "float32"}
    signals = {"encoding": encoding, "vllm": vllm}
    store = record_signals(write(home, "layers", objective=TERMS, signals=signals))
    local = record_signals(
        write(home, "layers-local", objective=TERMS, signals={"encoding": encoding})
    )
    assert open_store(store).settings.encoding == Hidden((1, 2, 3), 64)
    assert_stores_close(store, local)


def test_a_pooling_server_records_the_last_hidden_states_of_a_local_teacher(
    home: Path, python: str
) -> None:
    local = record_signals(write(home, "last-local", signals={"encoding": {"kind": "hidden"}}))
    top = {"kind": "top_k", "k": 4}
    with serving(home / "teacher", home / "pooling.log", *POOLING) as address:
        server = {"base_url": f"{address}/v1", "model": "tiny"}
        hidden = {"encoding": {"kind": "hidden"}, "server": server}
        store = record_signals(write(home, "last", signals=hidden))
        with pytest.raises(ModelError, match="no completions"):
            record_signals(write(home, "refused", signals={"encoding": top, "server": server}))
    assert_stores_close(store, local)
