"""Quantizing a student: counted bytes, measured KL, kept parts, and rejected settings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from stillhouse.check import check_recipe
from stillhouse.commands import prepare_data
from stillhouse.errors import RecipeError
from stillhouse.evaluation.fidelity import compare, heldout_answers
from stillhouse.evaluation.results import EVALUATION, Evaluation
from stillhouse.language_model.evaluate_stage import plan_evaluation
from stillhouse.quantize.grid import Grid
from stillhouse.quantize.moments import input_moments
from stillhouse.quantize.quantization import FILE, Quantization, rounded_inputs
from stillhouse.quantize.quantize import grid_of, quantization_notes, quantize
from stillhouse.quantize.quantize_config import QuantizeRecipe
from stillhouse.quantize.units import (
    Sensitivity,
    Unit,
    choose_kept,
    find_units,
    kl_of,
    left_over,
    left_over_text,
    measure,
    model_bytes,
    quantized,
    reference_answers,
    scales_of,
)
from stillhouse.runfolder import Cost, Stage
from stillhouse.teachers.load_model import load_model
from tests import tiny

GRID = Grid(4, 32)
VOCABULARY = 260


class ToyWindows:
    def __init__(self, count: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids_RL = torch.randint(0, VOCABULARY, (count, 24), generator=generator)

    def __len__(self) -> int:
        return len(self.ids_RL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_L = self.ids_RL[index]
        return {"input_ids": ids_L, "labels": ids_L.clone(), "position_ids": torch.arange(24)}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("student"))


def call(student: Path, out: Path, **section: Any) -> Any:
    return quantize(
        student,
        out,
        section=QuantizeRecipe(**{"sensitivity_tokens": 40, **section}),
        heldout=ToyWindows(),
        vocabulary=VOCABULARY,
        seed=0,
    )


# --- moments of inputs ---------------------------------------------------------------------------


class Padded(ToyWindows):
    """Windows of 24 tokens, of which the last 16 are padding; cut to the first `length` tokens."""

    def __init__(self, length: int = 24) -> None:
        super().__init__()
        self.length = length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = super().__getitem__(index)
        window["input_ids"][8:] = 0
        window["labels"] = torch.where(torch.arange(24) < 8, window["labels"], -100)
        window["position_ids"] = torch.arange(24) - torch.where(torch.arange(24) < 8, 0, 8)
        return {name: array_L[: self.length] for name, array_L in window.items()}


def test_padding_does_not_affect_the_moments_of_inputs() -> None:
    model = tiny.llama()
    expected = input_moments(model, Padded(length=8))
    for name, moment_I in input_moments(model, Padded()).items():
        assert_close(moment_I, expected[name])


# --- the parts of a model ------------------------------------------------------------------------


def test_a_tied_head_is_part_of_the_embeddings_and_counts_once() -> None:
    model = tiny.llama()
    units = find_units(model, GRID)
    assert [unit.name for unit in units] == ["embeddings", "layers.0", "layers.1", "layers.2"]
    norms = 7 * 32
    every_matrix = sum(p.numel() for p in model.parameters()) - norms
    assert sum(unit.numbers for unit in units) == every_matrix
    assert model_bytes(model, units, set(), GRID) == every_matrix * 18 // 32 + norms * 2
    kept = model_bytes(model, units, {"embeddings"}, GRID)
    assert kept - model_bytes(model, units, set(), GRID) == VOCABULARY * 32 * (64 - 18) // 32


def test_an_untied_head_is_a_separate_unit() -> None:
    units = find_units(tiny.llama(tie_word_embeddings=False), GRID)
    assert units[-1].name == "head"
    assert units[-1].weights == ["lm_head.weight"]
    assert units[0].numbers == units[-1].numbers == VOCABULARY * 32


def test_a_group_size_that_does_not_divide_the_rows_is_rejected(
    student: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="not a multiple of group_size 64") as caught:
        call(student, tmp_path, group_size=64)
    assert "group_size: 32" in str(caught.value.fix)


def test_widths_that_float8_kernels_cannot_multiply_are_rejected(tmp_path: Path) -> None:
    """Weights alone can still be float8, and embeddings are looked up, not multiplied."""
    student = tiny.save_model(tmp_path / "student", intermediate_size=72)
    with pytest.raises(
        RecipeError, match="72 by 32, but float8 kernels need multiples of 16"
    ) as caught:
        call(student, tmp_path / "refused", kind="float8_dynamic_float8")
    assert "kind: float8" in str(caught.value.fix)
    assert call(student, tmp_path / "weights", kind="float8").group_size is None


def test_float8_has_one_scale_per_row() -> None:
    model, grid = tiny.llama(), grid_of(QuantizeRecipe(kind="float8"))
    units = find_units(model, grid)
    norms, matrices = 7 * 32, [p for p in model.parameters() if p.ndim == 2]
    stored = sum(p.numel() + 2 * len(p) for p in matrices)
    assert model_bytes(model, units, set(), grid) == stored + norms * 2
    with pytest.raises(ValidationError, match="remove group_size"):
        QuantizeRecipe(kind="float8", group_size=32)


@pytest.mark.parametrize(("kind", "least"), [("int8", 3), ("int4", 2)])
def test_groups_so_small_that_nothing_is_saved_are_rejected(kind: Any, least: int) -> None:
    with pytest.raises(ValidationError, match="take at least 16 bits per number"):
        QuantizeRecipe(kind=kind, group_size=least - 1)
    unit = Unit("layers.0", ["weight"], 64 * least, 8)
    grid = grid_of(QuantizeRecipe(kind=kind, group_size=least))
    assert unit.bytes(grid) < unit.bytes(None)


def test_parameters_outside_linear_layers_are_named_and_counted_in_16_bits() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    experts = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **sizes,
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    left = left_over(experts)
    assert left["model.layers.1.mlp.experts.gate_up_proj"] == 4 * 64 * 32
    assert len(left) == 2 * 3, "two fused matrices and a router per layer"
    text = str(left_over_text(experts))
    assert text.startswith("6 tensors with ")
    assert "experts.gate_up_proj" in text
    units = find_units(experts, GRID)
    rounded = sum(unit.numbers for unit in units)
    rest = sum(p.numel() for p in experts.parameters()) - rounded
    assert model_bytes(experts, units, set(), GRID) == rounded * 18 // 32 + rest * 2
    transposed = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY))
    assert "transformer.h.0.mlp.c_fc.weight" in left_over(transposed)
    assert left_over_text(tiny.llama()) is None


def test_check_names_the_parts_that_cannot_be_quantized(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCABULARY}
    config = GPT2Config(**sizes, n_positions=256, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    raw = tiny.recipe(tmp_path, quantize={"kind": "int4"})
    raw["student"] = {"start": "random"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    findings = [one for one in check_recipe(path) if one.topic == "quantize"]
    assert "such as transformer.h.0.mlp" in findings[-1].text
    assert findings[-1].level == "warning"


# --- sensitivity ---------------------------------------------------------------------------------


def test_sensitivity_is_the_kl_of_quantizing_one_unit() -> None:
    """Compared with a second model, in which only that unit is quantized."""
    model, windows = tiny.llama(), ToyWindows()
    units = find_units(model, GRID)
    scales = scales_of(model, units, GRID)
    before = {name: p.clone() for name, p in model.named_parameters()}
    reference = reference_answers(model, windows)
    kl_with = partial(kl_of, model, windows=windows, reference=reference, vocabulary=VOCABULARY)
    measured = measure(units, scales, GRID, kl_with)
    found = {s.unit: s for s in measured}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for unit in units:
        other = tiny.llama()
        part = {name: scales[name] for name in unit.weights}
        Quantization(GRID, False, part).apply(other)
        kl = compare(
            heldout_answers(other, windows), heldout_answers(model, windows), VOCABULARY
        ).kl
        assert found[unit.name].kl == pytest.approx(kl, rel=1e-4)
        assert kl > 0
        assert found[unit.name].saved == unit.numbers * (64 - 18) // 32


def test_the_references_head_is_not_rounded_with_the_models() -> None:
    model = tiny.llama()
    reference = reference_answers(model, ToyWindows())
    head_VD = reference.signal.head.weight_VD.clone()
    scales = scales_of(model, find_units(model, GRID), GRID)
    with quantized(model, Quantization(GRID, False, scales)):
        assert torch.equal(reference.signal.head.weight_VD, head_VD)
        assert not torch.equal(model.lm_head.weight, head_VD)


THREE = [Sensitivity("a", 0.5, 1000), Sensitivity("b", 0.3, 100), Sensitivity("c", 0.1, 1000)]


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ({}, []),
        ({"max_kl": 1.0}, []),
        ({"max_kl": 0.7}, ["b"]),  # the most nats per byte come first
        ({"max_kl": 0.2}, ["b", "a"]),
        ({"max_bytes": 5100}, ["b"]),
        ({"max_bytes": 5099}, []),
        ({"max_bytes": 6100}, ["b", "a"]),
        ({"max_bytes": 6050}, ["b"]),
        ({"max_kl": 0.01, "max_bytes": 6100}, ["b", "a"]),
        ({"max_kl": 0.7, "max_bytes": 9999}, ["b"]),
    ],
)
def test_the_most_sensitive_units_are_kept_within_a_budget(
    budget: dict[str, Any], kept: list[str]
) -> None:
    assert choose_kept(THREE, smallest=5000, **budget) == kept


def test_a_budget_that_no_model_meets_is_rejected() -> None:
    with pytest.raises(RecipeError, match="5,000 bytes, more than 4,999"):
        choose_kept(THREE, smallest=5000, max_bytes=4999)


# --- complete quantizations ----------------------------------------------------------------------


def test_the_checkpoint_is_on_the_grid_with_its_scales(student: Path, tmp_path: Path) -> None:
    result = call(student, tmp_path, keep=["layers.1"])
    plain = dict(load_model(student, dtype=torch.float32).named_parameters())
    rounded = dict(load_model(tmp_path / "model", dtype=torch.float32).named_parameters())
    quantization = Quantization.load(tmp_path / FILE)
    for name, weight in rounded.items():
        if name in quantization.scales:
            codes = weight.unflatten(-1, (-1, 32)) / quantization.scales[name][..., None]
            assert torch.allclose(codes, codes.round(), atol=1e-5), name
            assert not torch.equal(weight, plain[name])
        else:
            assert torch.equal(weight, plain[name]), name
    assert not [name for name in quantization.scales if ".1." in name]
    assert result.kept == ["layers.1"]
    assert result.sensitivity == []
    assert 0 < result.kl < 1
    assert result.tokens >= 40
    assert result.bytes < result.plain_bytes


def test_a_kl_budget_keeps_the_sensitive_parts(student: Path, tmp_path: Path) -> None:
    everything = call(student, tmp_path / "all")
    result = call(student, tmp_path / "some", max_kl=everything.kl / 3)
    assert result.kept
    assert result.kl < everything.kl
    assert result.notes == []
    assert len(result.sensitivity) == 4
    kls = [s.kl for s in result.sensitivity]
    assert kls == sorted(kls, reverse=True)


def test_a_kl_budget_that_the_complete_model_exceeds_is_noted(student: Path) -> None:
    model = load_model(student, dtype=torch.float32)
    [note] = quantization_notes(model, 0.31, 0.3)
    assert "at most 0.3 (quantize.max_kl), but the quantized model's KL is 0.31" in note
    assert quantization_notes(model, 0.3, 0.3) == quantization_notes(model, 0.3, None) == []


def test_more_bits_have_a_lower_kl(student: Path, tmp_path: Path) -> None:
    kinds = ["int8", "int8_dynamic_int8", "int4", "int8_dynamic_int4"]
    kl = {kind: call(student, tmp_path / kind, kind=kind).kl for kind in kinds}
    assert kl["int8"] < kl["int8_dynamic_int8"] < kl["int4"]
    assert kl["int8_dynamic_int4"] > kl["int8_dynamic_int8"]
    assert kl["int8_dynamic_int4"] != kl["int4"]


def test_keeping_a_part_that_the_student_does_not_have_is_rejected(
    student: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"no part named 'layers\.9'") as caught:
        call(student, tmp_path, keep=["layers.9"])
    assert "embeddings, layers.0" in str(caught.value.fix)


# --- inputs --------------------------------------------------------------------------------------


def test_int8_inputs_are_rounded_as_by_torchao() -> None:
    torchao = pytest.importorskip(
        "torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor"
    )
    inputs_LI = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    inputs_LI[3] = inputs_LI[3].abs()
    expected_LI = torchao._apply_int8_act_asym_per_token_quant_dequant(inputs_LI)
    assert torch.allclose(rounded_inputs(inputs_LI), expected_LI, atol=1e-6)


def test_float8_inputs_are_rounded_as_by_torchao() -> None:
    """A token of zeros stays zero, whereas torchao divides it by a scale of 0."""
    torchao = pytest.importorskip("torchao.quantization")
    inputs_LI = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    expected_LI = torchao.Float8Tensor.from_hp(inputs_LI, torch.float8_e4m3fn, torchao.PerRow())
    found_LI = rounded_inputs(inputs_LI, floating=True)
    assert torch.allclose(found_LI, expected_LI.dequantize(), atol=1e-6)
    assert not rounded_inputs(torch.zeros(1, 8), floating=True).any()


def test_gradients_pass_through_the_rounding_of_inputs_unchanged() -> None:
    inputs_LI = torch.randn(2, 8, requires_grad=True)
    rounded_inputs(inputs_LI).sum().backward()
    assert inputs_LI.grad is not None
    assert torch.equal(inputs_LI.grad, torch.ones(2, 8))


def test_inputs_are_rounded_until_the_hook_is_removed() -> None:
    model = tiny.llama()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 32)
    plain = layer(x)
    name = "model.layers.0.mlp.up_proj.weight"
    [hook] = Quantization(GRID, True, {name: torch.ones(1)}).round_inputs(model)
    assert torch.equal(layer(x), torch.nn.functional.linear(rounded_inputs(x), layer.weight))
    hook.remove()
    assert torch.equal(layer(x), plain)


@pytest.mark.run
def test_a_dynamic_student_is_evaluated_with_its_inputs_rounded(tmp_path: Path) -> None:
    """One checkpoint is evaluated with a kind that rounds inputs and with one that does not."""
    kl = {}
    for kind in ("int8", "int8_dynamic_int8"):
        folder = tmp_path / kind
        raw = tiny.recipe(folder, quantize={"kind": kind, "calibration_tokens": None})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
        job, windows, _ = prepare_data(folder / "recipe.yaml")
        call(folder / "teacher", folder / "rounded", kind=kind)
        stage = Stage("quantize", folder / "rounded", "", Cost(), {"bytes": 1}, False)
        teacher = Stage("train", folder, "", Cost(), {}, False)
        (folder / "model").symlink_to(folder / "teacher")
        assert windows.path is not None
        data = Stage("data", windows.path.parent, "", Cost(), {}, False)
        plan_evaluation(job, data, teacher, teacher, None, None, None, stage).work(folder)
        found = Evaluation.load(folder / EVALUATION).result("quantized")
        assert found is not None
        kl[kind] = found.fidelity.kl
    assert kl["int8_dynamic_int8"] > 1.2 * kl["int8"]
