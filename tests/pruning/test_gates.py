"""The gates that every pruned checkpoint passes, for every family and every axis.

1. A prune to the same size changes nothing. 2. A rotation alone changes no logit. 3. Saved, then
loaded in a fresh process by plain transformers, no weight is missing or left over. 4. Its logits
are those of the model in memory. 5. Every weight has its place in a GGUF file.
Besides: the sizes are the predicted ones, and generation with and without a cache agrees.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from stillhouse.account import count_parameters
from stillhouse.pruning import (
    ARCHITECTURES,
    check_sizes,
    prune_model,
    resized_config,
    sizes_of,
)
from tests.teachers.toys import VOCABULARY, ToyWindows, tiny_model

IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(9))
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True, "attention_bias": True},
    "mistral": {},
    "ministral": {},
    "ministral3": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
}
NOT_ROTATED = {"gemma", "gemma2", "gemma3_text"}
KEPT_IDS = [0, 1, 2, *range(VOCABULARY - 1, 20, -2)]
AXES: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_size": 24},
    "heads": {"heads": 2},
    "groups": {"kv_heads": 1},
    "channels": {"hidden_size": 24},
    "rotation": {"hidden_size": 24, "hidden_method": "rotation"},
    "experts": {"experts": 4},
    "vocabulary": {"kept_ids": KEPT_IDS},
    "mixed": {
        "layers": 2,
        "ffn_size": 24,
        "heads": 2,
        "kv_heads": 1,
        "hidden_size": 24,
        "kept_ids": KEPT_IDS,
    },
}
CASES = [
    (kind, axis)
    for kind in FAMILIES
    for axis in AXES
    if (axis != "rotation" or kind not in NOT_ROTATED)
    and (axis != "experts" or kind == "qwen3_moe")
]


def family(kind: str) -> Any:
    """A tiny model whose norms' gains and biases are not the ones of initialization."""
    model = tiny_model(kind, **FAMILIES[kind])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def cut(kind: str, axis: str) -> Any:
    model = family(kind)
    prune_model(model, ToyWindows(), calibration_tokens=256, **AXES[axis])
    return model


def test_every_declared_architecture_is_tested() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gate_1_the_same_sizes_give_the_same_logits(kind: str) -> None:
    model = family(kind)
    whole = sizes_of(model.config)
    prune_model(
        model,
        ToyWindows(),
        layers=whole.layers,
        ffn_size=whole.ffn_size,
        heads=whole.heads,
        kv_heads=whole.kv_heads,
        hidden_size=whole.hidden_size,
        experts=whole.experts,
        kept_ids=range(whole.vocabulary),
    )
    assert torch.equal(logits(model), logits(family(kind)))


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - NOT_ROTATED))
def test_gate_2_a_rotation_alone_gives_the_same_logits(kind: str) -> None:
    model = family(kind)
    report = prune_model(model, ToyWindows(), hidden_size=32, hidden_method="rotation")
    plain = family(kind)
    assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    first = plain.base_model.layers[0].self_attn.o_proj.weight
    assert not torch.allclose(model.base_model.layers[0].self_attn.o_proj.weight, first, atol=0.1)
    assert any("unties the head" in note for note in report.notes) == (
        plain.config.tie_word_embeddings
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case pruned and saved, with the logits that it had in memory."""
    folder = tmp_path_factory.mktemp("pruned")
    for kind, axis in CASES:
        model = cut(kind, axis)
        place = folder / f"{kind}-{axis}"
        model.save_pretrained(place)
        ids = IDS % model.config.vocab_size
        save_file({"ids": ids, "logits": logits(model, ids)}, place / "expected.st")
    return folder


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_the_sizes_are_as_predicted(kind: str, axis: str, checkpoints: Path) -> None:
    sizes = {key: value for key, value in AXES[axis].items() if key != "kept_ids"}
    config = family(kind).config
    vocabulary = len(KEPT_IDS) if "kept_ids" in AXES[axis] else None
    after = check_sizes(config, vocabulary=vocabulary, **sizes)
    with torch.device("meta"):
        predicted = AutoModelForCausalLM.from_config(
            resized_config(config, after, rotated=axis == "rotation")
        )
    loaded = AutoModelForCausalLM.from_pretrained(checkpoints / f"{kind}-{axis}")
    assert count_parameters(loaded) == count_parameters(predicted)
    assert count_parameters(loaded).total < count_parameters(family(kind)).total
    assert sizes_of(loaded.config) == after


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_it_generates_with_a_cache_as_without(kind: str, axis: str, checkpoints: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints / f"{kind}-{axis}")
    ids = IDS[:, :6] % model.config.vocab_size
    cached, plain = (
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(folder / "expected.st")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model(input_ids=expected["ids"], use_cache=False).logits
    error = (logits - expected["logits"]).abs().max().item()
    keys = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for key in info[kind]]
    found[folder.name] = {"error": error / expected["logits"].abs().max().item(), "keys": keys}
print(json.dumps(found))
"""


def test_gates_3_and_4_a_fresh_process_loads_the_same_model(checkpoints: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(checkpoints)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == {f"{kind}-{axis}" for kind, axis in CASES}
    assert [name for name, one in found.items() if one["keys"] or one["error"] > 1e-5] == []


GGUF_NAMES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "ministral3": "mistral3"}


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_gate_5_every_weight_has_its_place_in_gguf(kind: str, axis: str, checkpoints: Path) -> None:
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    # llama.cpp stores Mistral's weights as Llama's; Ministral's parts are the same.
    name = "llama" if kind in ("mistral", "ministral") else GGUF_NAMES.get(kind, kind)
    config = json.loads((checkpoints / f"{kind}-{axis}" / "config.json").read_text())
    places = gguf.get_tensor_name_map(known[name], config["num_hidden_layers"])
    found = {}
    for weight, values in load_file(checkpoints / f"{kind}-{axis}" / "model.safetensors").items():
        # The converter stacks the experts of a layer.
        stacked = ".".join(
            step
            for step, last in zip(weight.split("."), ["", *weight.split(".")], strict=False)
            if not (step.isdigit() and last == "experts")
        )
        found[weight] = places.get_name(stacked, try_suffixes=(".weight", ".bias"))
        assert values.is_contiguous()
    assert [weight for weight, place in found.items() if place is None] == []
    # What the converter reads where head_dim is not hidden_size / heads.
    if config["hidden_size"] // config["num_attention_heads"] != 8:
        assert config["head_dim"] == 8
