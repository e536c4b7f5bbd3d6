"""The exported checkpoint is the trained one, rounded, and any other folder is rejected."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stillhouse.errors import ModelError
from stillhouse.export import checkpoint, replay, replay_checks
from stillhouse.export import fresh_process as script
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.export_formats import FLOATS
from stillhouse.export.gate import Gate, ReplayResult
from stillhouse.hardware import Precision
from tests.export.conftest import TEMPLATE, ToyWindows

Export = Callable[..., ReplayResult]


@pytest.fixture
def export() -> Export:
    def call(source: Path, out: Path, **changes: Any) -> ReplayResult:
        dtype = changes.pop("dtype", "bfloat16")
        options: dict[str, Any] = {"windows": ToyWindows(), "prompts": ["word3 word4"], "seed": 0}
        return export_checkpoint(Gate(source, **{**options, **changes}), out, dtype=dtype)

    return call


@pytest.fixture(scope="module")
def shipped(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReplayResult]:
    """The bfloat16 export, replayed in a fresh process."""
    out = tmp_path_factory.mktemp("shipped") / "model"
    asked = Gate(trained, ToyWindows(), ["word3 word4"], seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "subprocess", subprocess)
        result = export_checkpoint(asked, out, dtype="bfloat16")
    return out, result


class _RuntimeCode(ast.NodeTransformer):
    """Removes code that only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else node


@pytest.mark.parametrize("module", [replay, replay_checks])
def test_the_replay_does_not_import_stillhouse(module: ModuleType) -> None:
    script = _RuntimeCode().visit(
        ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
    )
    imported = {node.module for node in ast.walk(script) if isinstance(node, ast.ImportFrom)}
    imported |= {
        name.name
        for node in ast.walk(script)
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert "transformers" in imported
    assert not any(str(name).startswith("stillhouse") for name in imported)


@pytest.mark.run
def test_a_bfloat16_export_is_the_rounded_source(
    trained: Path, shipped: tuple[Path, ReplayResult]
) -> None:
    out, result = shipped
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name].bfloat16()), name
    assert 0 < result.kl < result.kl_limit
    assert 0.5 < result.top1_agreement <= 1
    assert result.tokens == 3 * 20
    assert result.bytes == (out / "model.safetensors").stat().st_size
    assert result.texts[0].prompt == "word3 word4"
    assert result.texts[0].source.startswith("word")


@pytest.mark.run
@pytest.mark.parametrize("native", [True, False])
def test_a_device_without_bfloat16_replays_in_float32(
    trained: Path,
    tmp_path: Path,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
) -> None:
    used: list[torch.dtype] = []
    dtype = torch.bfloat16 if native else torch.float32
    monkeypatch.setattr(
        checkpoint, "choose_precision", lambda *_: Precision(dtype, "float32: a reason")
    )
    compare = replay._compare

    def recording(runtimes: dict[str, Any], windows: Any) -> Any:
        used.append(runtimes["exported"].args[0].dtype)
        return compare(runtimes, windows)

    monkeypatch.setattr(replay, "_compare", recording)
    result = export(trained, tmp_path / "model")
    assert used == [dtype, dtype], "compared with the source, then with the rounded source"
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}, "only the replay differs"
    noted = ["The bfloat16 export is replayed in float32: a reason."]
    assert result.notes == ([] if native else noted)
    assert result.kl > 0, "the weights are rounded either way"


@pytest.mark.run
def test_an_export_has_everything_that_a_server_needs(
    trained: Path, shipped: tuple[Path, ReplayResult]
) -> None:
    out, _ = shipped
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("word5")["input_ids"] == [7]
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert list(out.parent.iterdir()) == [out], "no temporary file is left"
    for file in out.glob("*.json"):
        assert str(trained) not in file.read_text(), "no local path is shipped"


def test_a_float32_export_equals_the_source_bit_for_bit(
    trained: Path, tmp_path: Path, export: Export
) -> None:
    result = export(trained, tmp_path / "model", dtype="float32")
    assert result.kl == pytest.approx(0, abs=1e-12)
    assert result.top1_agreement == 1
    assert result.texts[0].source == result.texts[0].exported
    before = load_file(trained / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_comparison_agrees_with_one_token_at_a_time(trained: Path) -> None:
    """The reference runs each prefix of a document alone, without packing or chunks."""
    windows = ToyWindows()
    source = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    runtimes: dict[str, replay.Answers] = {
        "source": partial(replay.logits_of, source),
        "exported": partial(replay.logits_of, other),
    }
    tokens, pairs = replay._compare(runtimes, {str(i): windows[i] for i in range(len(windows))})
    found = {**pairs["source ‖ exported"], "tokens": tokens}

    total, same, count = 0.0, 0, 0
    with torch.no_grad():
        for index in range(len(windows)):
            ids_L = windows[index]["input_ids"]
            for target in range(4, 24):
                start = 0 if target - 1 < 10 else 10
                prefix = ids_L[None, start:target]
                p = source(prefix).logits[0, -1].double().softmax(-1)
                q = other(prefix).logits[0, -1].double().softmax(-1)
                total += float((p * (p / q).log()).sum())
                same += int(p.argmax() == q.argmax())
                count += 1
    assert found["tokens"] == count
    assert found["kl"] == pytest.approx(total / count, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(same / count)


def test_an_export_that_differs_too_much_is_rejected(
    trained: Path, tmp_path: Path, export: Export
) -> None:
    with pytest.raises(ModelError, match="nats/token") as caught:
        export(trained, tmp_path / "model", kl_limit=1e-12)
    assert caught.value.fix


def test_an_export_with_wrong_weights_is_rejected(
    trained: Path, tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint._save

    def save_wrongly(source: Path, out: Path, *options: Any) -> None:
        save(source, out, *options)
        weights = load_file(out / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"].neg_()
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "_save", save_wrongly)
    with pytest.raises(ModelError, match="differs from its source"):
        export(trained, tmp_path / "model")


def scaled(model: Path, name: str, factor: float) -> None:
    """Multiplies one tensor of a checkpoint by a factor."""
    weights = load_file(model / "model.safetensors")
    weights[name] *= factor
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("native", [True, False])
def test_a_fault_within_the_limit_for_rounding_is_rejected(
    trained: Path,
    tmp_path: Path,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
) -> None:
    dtype = torch.bfloat16 if native else torch.float32
    monkeypatch.setattr(checkpoint, "choose_precision", lambda *_: Precision(dtype, "a reason"))
    save = checkpoint._save

    def save_wrongly(source: Path, out: Path, *options: Any) -> None:
        save(source, out, *options)
        scaled(out, "model.layers.1.self_attn.v_proj.weight", 0.8)

    monkeypatch.setattr(checkpoint, "_save", save_wrongly)
    with pytest.raises(ModelError, match="rounded to the same numbers, by") as caught:
        export(trained, tmp_path / "model")
    cost = float(str(caught.value).split("by ")[1].split()[0])
    assert 0.001 < cost < 0.01, "the limit for rounding alone would accept it"


def test_rounding_beyond_the_default_limit_is_a_note_unless_the_recipe_has_a_limit(
    trained: Path, tmp_path: Path, export: Export
) -> None:
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    scaled(source, "model.norm.weight", 200.0)  # large logits, whose rounding errors are large
    result = export(source, tmp_path / "model")
    assert result.kl > result.kl_limit == FLOATS["bfloat16"]
    assert "Rounding costs" in result.notes[-1]
    assert "export.dtype: float32" in result.notes[-1]
    with pytest.raises(ModelError, match="nats/token"):
        export(source, tmp_path / "other", kl_limit=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update({"projection.weight": torch.ones(2)}), "unexpected"),
        (lambda weights: weights.pop("model.norm.weight"), "missing: model.norm.weight"),
    ],
)
def test_an_export_with_unexpected_or_missing_weights_is_rejected(
    trained: Path,
    tmp_path: Path,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
) -> None:
    save = checkpoint._save

    def save_wrongly(source: Path, out: Path, *options: Any) -> None:
        save(source, out, *options)
        weights = load_file(out / "model.safetensors")
        change(weights)
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "_save", save_wrongly)
    with pytest.raises(ModelError, match=message):
        export(trained, tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("gpt_neox", {}),
    ],
)
def test_weights_that_transformers_renames_on_load_keep_their_names_on_disk(
    trained: Path, tmp_path: Path, export: Export, kind: str, sizes: dict[str, int]
) -> None:
    """transformers 5 loads a layer's experts into one tensor, but stores them separately."""
    source = tmp_path / "source"
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.save_pretrained(source)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **shape, **heads, **ends, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    export(source, tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert names == load_file(source / "model.safetensors").keys()


def test_a_source_with_unexpected_weights_is_rejected(
    trained: Path, tmp_path: Path, export: Export
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    weights = load_file(source / "model.safetensors")
    weights["projection.weight"] = torch.ones(2, 2)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"projection\.weight"):
        export(source, tmp_path / "model")


@pytest.mark.run
@pytest.mark.fresh_process
def test_an_export_that_a_fresh_process_cannot_load_is_rejected(
    trained: Path, tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint._save

    def forget_tokenizer(source: Path, out: Path, *options: Any) -> None:
        save(source, out, *options)
        for file in out.glob("tokenizer*"):
            file.unlink()

    monkeypatch.setattr(checkpoint, "_save", forget_tokenizer)
    with pytest.raises(ModelError, match="cannot be loaded and run again"):
        export(trained, tmp_path / "model")


def test_windows_without_a_supervised_token_are_rejected(
    trained: Path, tmp_path: Path, export: Export
) -> None:
    with pytest.raises(ModelError, match="no held-out token"):
        export(trained, tmp_path / "model", windows=ToyWindows(supervised=False))
