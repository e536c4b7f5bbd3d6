"""The gates that every pruned checkpoint passes, for every family and every axis.

1. Pruning to the same sizes changes nothing. 2. A rotation alone changes no logit. 3. When plain
transformers loads the checkpoint in a fresh process, no weight is missing or unexpected. 4. Its
logits are those of the model in memory. 5. Its GGUF file has the same numbers, and the same logits
in llama.cpp and, if transformers reads the architecture correctly, in transformers.

In addition, the sizes are as predicted, and generation with and without a cache agrees.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.account import count_parameters
from stillhouse.errors import ModelError
from stillhouse.export import gguf_model
from stillhouse.export.gguf_config import misread_by_transformers
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.pruning.axes import ARCHITECTURES, axes_of
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.sizes import AXES as SIZES
from stillhouse.pruning.sizes import check_sizes, resized_config, sizes_of
from tests.gguf_files import (
    assert_alike,
    expected_tensors,
    letters,
    llama_cpp_logits,
    real,
    tensors_of,
    transformers_logits,
)
from tests.teachers.toys import VOCABULARY, ToyWindows, tiny_model

pytestmark = pytest.mark.run

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


def family(kind: str, changes: dict[str, Any] | None = None) -> Any:
    """A tiny model whose norm gains and biases differ from their initial values."""
    model = tiny_model(kind, **{**FAMILIES[kind], **(changes or {})})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def cut(kind: str, axis: str, changes: dict[str, Any] | None = None, **sizes: Any) -> Any:
    model = family(kind, changes)
    prune_model(model, ToyWindows(), calibration_tokens=256, **{**AXES[axis], **sizes})
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
    """Every case, pruned and saved, with its logits in memory."""
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
    sizes = {key: AXES[axis].get(key) for key in SIZES}
    config = family(kind).config
    sizes["vocabulary"] = len(KEPT_IDS) if "kept_ids" in AXES[axis] else None
    method = AXES[axis].get("hidden_method", "channels")
    after = check_sizes(config, sizes, hidden_method=method)
    with torch.device("meta"):
        predicted = AutoModelForCausalLM.from_config(
            resized_config(config, after, rotated=axis == "rotation")
        )
    loaded = AutoModelForCausalLM.from_pretrained(checkpoints / f"{kind}-{axis}")
    assert count_parameters(loaded) == count_parameters(predicted)
    assert count_parameters(loaded).total < count_parameters(family(kind)).total
    assert sizes_of(loaded.config) == after


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_generation_with_and_without_a_cache_agrees(
    kind: str, axis: str, checkpoints: Path
) -> None:
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


LIKE_LLAMA_CPP = {
    "smollm3": {"attention_bias": False, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
}
"""What llama.cpp hard-codes for a family: no bias, and no RoPE in every fourth layer."""


@pytest.fixture(scope="module")
def converted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a float32 GGUF file of every case.

    Families in LIKE_LLAMA_CPP are pruned again, into the folder that is returned.
    """
    folder = tmp_path_factory.mktemp("converted")
    words = letters()
    for kind, axis in CASES:
        place = checkpoints / f"{kind}-{axis}"
        if kind in LIKE_LLAMA_CPP:
            place = folder / f"{kind}-{axis}"
            changes = {"layers": 3} if "layers" in AXES[axis] else {}
            cut(kind, axis, LIKE_LLAMA_CPP[kind], **changes).save_pretrained(place)
        words.save_pretrained(place)
        form = FORMATS["f32"]
        write_gguf(place, place / "toy.gguf", form, name="toy")
    return folder


def place_of(kind: str, axis: str, checkpoints: Path, converted: Path) -> Path:
    return (converted if kind in LIKE_LLAMA_CPP else checkpoints) / f"{kind}-{axis}"


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_gate_5_its_gguf_file_has_the_same_numbers_and_logits(
    kind: str, axis: str, checkpoints: Path, converted: Path
) -> None:
    place = place_of(kind, axis, checkpoints, converted)
    config = AutoConfig.from_pretrained(place)
    expected, written = expected_tensors(place, config), tensors_of(place / "toy.gguf")
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(written[name], values), name
    if misread_by_transformers(config) is None:
        ids = IDS % config.vocab_size
        found = transformers_logits(place / "toy.gguf", ids)
        assert_close(found, logits(loaded(place), ids), rtol=1e-5, atol=1e-5)
    else:
        assert kind not in ("llama", "mistral")


@real
@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_gate_5_llama_cpp_computes_the_same_logits(
    kind: str, axis: str, checkpoints: Path, converted: Path
) -> None:
    place = place_of(kind, axis, checkpoints, converted)
    model = loaded(place)
    ids = IDS[:1] % model.config.vocab_size
    found, expected = llama_cpp_logits(place / "toy.gguf", ids[0]), logits(model, ids)[0]
    clear_L = clearly_routed(model, ids[0])
    assert clear_L.sum() > len(clear_L) / 2
    assert_alike(found[clear_L], expected[clear_L])


def clearly_routed(model: Any, ids_L: torch.Tensor) -> torch.Tensor:
    """Tokens [L] whose experts do not depend on rounding; llama.cpp's KV cache is float16."""
    clear_L = torch.ones(len(ids_L), dtype=torch.bool)
    if axes_of(model.config).experts is None:
        return clear_L
    found = model(input_ids=ids_L[None], output_router_logits=True, use_cache=False)
    chosen = model.config.num_experts_per_tok
    for logits_LE in found.router_logits:
        share_LE = logits_LE.softmax(-1).sort(descending=True).values
        clear_L &= share_LE[:, chosen - 1] - share_LE[:, chosen] > 0.001
    return clear_L


def test_a_cut_in_depth_that_llama_cpp_computes_differently_is_rejected() -> None:
    config = family("smollm3").config
    config.attention_bias = False
    with pytest.raises(ModelError, match="other layers than every 4th"):
        gguf_model.family(config)
