"""A quantized student's numbers are the same in torchao's tensors and in GGUF's blocks."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Literal

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.errors import ModelError
from stillhouse.export import gguf_export
from stillhouse.export import torchao as torchao_export
from stillhouse.export.gate import Gate
from stillhouse.export.gguf_blocks import fitting_kind, packed_blocks, second_rounding
from stillhouse.export.gguf_export import announce_gguf, export_gguf, write_form
from stillhouse.export.gguf_file import FORMATS
from stillhouse.export.torchao import export_torchao, save_torchao
from stillhouse.quantize.grid import Grid, choose_scales, on_grid
from stillhouse.quantize.quantization import FILE, Quantization, rounded_inputs
from stillhouse.quantize.quantize import quantize
from stillhouse.quantize.quantize_config import QuantizeRecipe
from stillhouse.teachers.load_model import load_model
from tests import tiny
from tests.export.conftest import ToyWindows
from tests.teachers.toys import tiny_model

pytestmark = pytest.mark.run

KINDS = ("int4", "int8", "float8", "int8_dynamic_int4", "float8_dynamic_float8")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the quantize stage, by kind; one layer is not quantized."""
    folder = tmp_path_factory.mktemp("rounded")
    words = tiny.merging_tokenizer()
    model = tiny.llama(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, initializer_range=0.05
    )
    model.save_pretrained(folder / "student")
    words.save_pretrained(folder / "student")
    for kind in KINDS:
        section = QuantizeRecipe.model_validate({"kind": kind, "keep": ["layers.1"]})
        quantize(
            folder / "student",
            folder / kind,
            section=section,
            heldout=ToyWindows(),
            vocabulary=len(words),
            seed=0,
        )
    return {kind: folder / kind for kind in KINDS}


def read(file: Path) -> list[gguf.ReaderTensor]:
    return list(gguf.GGUFReader(file).tensors)


def gate(folder: Path) -> Gate:
    return Gate(folder / "model", ToyWindows(), ["the cat"], 0)


# --- torchao -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
def test_torchao_in_float32_has_exactly_the_trained_numbers(
    rounded: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("torchao")
    folder = rounded[kind]
    quantization = Quantization.load(folder / FILE)
    out = tmp_path / "out"
    result = export_torchao(gate(folder), out, quantization=quantization, dtype="float32")
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.texts[0].source == result.texts[0].exported
    source = dict(load_model(folder / "model", dtype=torch.float32).named_parameters())
    loaded = dict(AutoModelForCausalLM.from_pretrained(out, dtype="auto").named_parameters())
    assert source.keys() == loaded.keys()
    for name, weight in loaded.items():
        plain = weight.dequantize() if name in quantization.scales else weight
        assert torch.equal(plain, source[name]), name


@pytest.fixture(scope="module")
def rounded_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 Gemma 3. The scale of its embeddings is a buffer that is not in the checkpoint."""
    folder = tmp_path_factory.mktemp("gemma")
    words = tiny.merging_tokenizer()
    model = tiny_model("gemma3_text", vocab_size=len(words), hidden_size=64, intermediate_size=96)
    model.save_pretrained(folder / "student")
    words.save_pretrained(folder / "student")
    section = QuantizeRecipe(kind="int8")
    quantize(
        folder / "student",
        folder / "rounded",
        section=section,
        heldout=ToyWindows(),
        vocabulary=len(words),
        seed=0,
    )
    return folder / "rounded"


EMBEDDINGS = "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_with_a_scale_of_their_own_are_stored_as_floats(
    rounded_gemma: Path, tmp_path: Path, dtype: str
) -> None:
    """transformers leaves the scale of quantized embeddings uninitialized."""
    pytest.importorskip("torchao")
    quantization = Quantization.load(rounded_gemma / FILE)
    assert EMBEDDINGS in quantization.scales
    out = tmp_path / "out"
    result = export_torchao(gate(rounded_gemma), out, quantization=quantization, dtype=dtype)
    assert result.kl < (1e-9 if dtype == "float32" else result.kl_limit)
    assert [note.split()[0] for note in result.notes] == [EMBEDDINGS]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    parameters = dict(loaded.named_parameters())
    assert type(parameters[EMBEDDINGS]) is torch.nn.Parameter
    assert loaded.lm_head.weight is parameters[EMBEDDINGS]
    assert loaded.model.embed_tokens.embed_scale == 8
    assert type(parameters["model.layers.0.mlp.up_proj.weight"]) is not torch.nn.Parameter


def test_a_model_with_quantized_embeddings_is_loaded_with_their_scale(
    rounded_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that quantize every embedding write such models."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torchao_export, "_has_other_buffers", lambda model, name: False)
    quantization = Quantization.load(rounded_gemma / FILE)
    assert save_torchao(rounded_gemma / "model", tmp_path, quantization, torch.float32) == []
    expected = load_model(rounded_gemma / "model", dtype=torch.float32)
    found = load_model(tmp_path, dtype=torch.float32)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    ids = ToyWindows().ids_RL
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["int4", "int8", "float8", "int8_dynamic_int4"])
def test_an_export_is_loaded_as_a_teacher(
    rounded: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("torchao")
    quantization = Quantization.load(rounded[kind] / FILE)
    save_torchao(rounded[kind] / "model", tmp_path, quantization, torch.float32)
    expected = load_model(rounded[kind] / "model", dtype=torch.float32)
    found = load_model(tmp_path, dtype=torch.float32)
    ids = ToyWindows().ids_RL
    different = (found(input_ids=ids).logits - expected(input_ids=ids).logits).abs().max()
    assert different < (0.5 if quantization.dynamic else 1e-6)
    assert (different > 0) == quantization.dynamic
    weight = found.model.layers[0].mlp.up_proj.weight
    assert (type(weight) is torch.nn.Parameter) != quantization.dynamic


@pytest.mark.parametrize("start", ["random", "pretrained"])
def test_a_quantized_export_teaches_in_a_run(
    rounded: dict[str, Path], tmp_path: Path, start: str
) -> None:
    pytest.importorskip("torchao")
    recipe = tiny.recipe(tmp_path)
    student = {"model": str(rounded["int8"].parent / "student")} if start == "pretrained" else {}
    recipe["student"] = {"start": start, **student}
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "teacher").mkdir()
    quantization = Quantization.load(rounded["int8"] / FILE)
    save_torchao(rounded["int8"] / "model", tmp_path / "teacher", quantization, torch.bfloat16)
    assert not [finding for finding in check_recipe(recipe) if finding.level == "error"]
    run(recipe)
    shipped = json.loads((tmp_path / "run" / "model" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in shipped


def test_metadata_of_a_file_is_sorted_so_that_equal_models_are_equal_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    weight = torch.arange(6.0).reshape(2, 3)
    save_file({"weight": weight}, file, metadata={f"name {n}": "é\\" for n in range(50)})
    torchao_export._sort_metadata(file)
    with safe_open(file, "pt") as opened:
        assert list(opened.metadata().values()) == ["é\\"] * 50
        assert opened.get_tensor("weight").equal(weight)
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


@pytest.mark.run
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param("int8_dynamic_int4", "int4", marks=pytest.mark.fresh_process),
        ("float8_dynamic_float8", "float8"),
    ],
)
def test_torchao_with_rounded_inputs_is_replayed(
    rounded: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    pytest.importorskip("torchao")
    folder = rounded[kind]
    quantization = Quantization.load(folder / FILE)
    result = export_torchao(
        gate(folder), tmp_path / "out", quantization=quantization, dtype="bfloat16"
    )
    assert 0 < result.kl < result.kl_limit
    assert result.dtype == f"torchao {name}, bfloat16"


@pytest.mark.parametrize(
    ("device", "dtype", "limit"),
    [
        ("cpu", torch.float32, 1e-5),
        pytest.param("cuda", torch.bfloat16, 5e-3, marks=pytest.mark.cuda),
    ],
)
@pytest.mark.parametrize("kind", ["int8_dynamic_int4", "float8_dynamic_float8"])
def test_torchao_rounds_inputs_as_rounded_inputs_does(
    rounded: dict[str, Path], kind: str, device: str, dtype: torch.dtype, limit: float
) -> None:
    pytest.importorskip("torchao")
    quantization = Quantization.load(rounded[kind] / FILE)
    model = load_model(rounded[kind] / "model", dtype=torch.float32)
    name = quantization.dynamic_layers(model)[0]
    weight_OI = dict(model.named_parameters())[name].detach()
    packed = torchao_export._tensor(
        weight_OI, quantization.scales[name], quantization, dtype, dynamic=True
    )
    inputs_NI = torch.randn(16, weight_OI.shape[1], generator=torch.Generator().manual_seed(0))
    inputs_NI = inputs_NI.to(device, dtype)
    theirs_NO = torch.nn.functional.linear(inputs_NI, packed.to(device)).float().cpu()
    seen_NI = rounded_inputs(inputs_NI, floating=quantization.grid.floating).float().cpu()
    ours_NO = seen_NI @ weight_OI.T
    assert (theirs_NO - ours_NO).norm() < limit * ours_NO.norm()
    assert (inputs_NI.float().cpu() @ weight_OI.T - ours_NO).norm() > 1e-3 * ours_NO.norm()


def test_the_error_without_torchao_names_an_alternative(
    rounded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quantization = Quantization.load(rounded["int4"] / FILE)
    with pytest.raises(ModelError, match="not installed") as caught:
        export_torchao(
            gate(rounded["int4"]), tmp_path / "out", quantization=quantization, dtype="float32"
        )
    assert "gguf-q4_0" in str(caught.value.fix)


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "form"), [(4, 32, "q4_0"), (4, 64, "q8_0"), (8, 32, "q8_0")]
)
def test_blocks_hold_the_grid_exactly(bits: Literal[4, 8], group: int, form: str) -> None:
    """Compared with gguf's own dequantization."""
    grid = Grid(bits, group)
    weight_OI = 0.1 * torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    scales_OG = choose_scales(weight_OI, grid)
    weight_OI = on_grid(weight_OI, scales_OG, grid)
    kind = fitting_kind(grid, FORMATS[form])
    assert kind is not None
    _, blocks = packed_blocks(weight_OI, scales_OG, grid, kind)
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks, kind)), weight_OI)


@pytest.mark.parametrize(
    ("grid", "form"),
    [
        (Grid(8, 32), "q4_0"),
        (Grid(4, 16), "q4_0"),
        (Grid(4, 32), "f16"),
        (Grid(8, None, floating=True), "q8_0"),
    ],
)
def test_a_format_that_cannot_hold_the_grid_has_no_fitting_kind(grid: Grid, form: str) -> None:
    assert fitting_kind(grid, FORMATS[form]) is None


@pytest.mark.parametrize(("kind", "form"), [("int4", "q4_0"), ("int4", "q8_0"), ("int8", "q8_0")])
def test_gguf_ships_the_trained_numbers(
    rounded: dict[str, Path], tmp_path: Path, kind: str, form: str
) -> None:
    """Numbers on the grid are exact, and the layer that is not quantized has 16 bits."""
    folder = rounded[kind]
    quantization = Quantization.load(folder / FILE)
    out = tmp_path / "out"
    result = export_gguf(gate(folder), out, kind=form, name="toy", quantization=quantization)
    assert result.notes == []
    assert result.kl_limit == 0.001
    loaded = AutoModelForCausalLM.from_pretrained(
        out, gguf_file=f"toy-{form}.gguf", dtype=torch.float32
    )
    source = dict(load_model(folder / "model", dtype=torch.float32).named_parameters())
    for name, weight in loaded.named_parameters():
        kept = weight.ndim > 1 and name not in quantization.scales
        assert torch.equal(weight, source[name].half().float() if kept else source[name]), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read(out / f"toy-{form}.gguf")}
    assert kinds["blk.0.ffn_down.weight"] == form.upper()
    assert kinds["blk.1.ffn_down.weight"] == "F16"


def test_unquantized_numbers_beyond_float16_are_bfloat16(
    rounded: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(rounded["int4"], tmp_path / "int4") / "model"
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][0, 0] = 1e5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    quantization = Quantization.load(source.parent / FILE)
    file = tmp_path / "toy.gguf"
    limit, _ = write_form(source, file, kind="q4_0", name="toy", quantization=quantization)
    assert limit == FORMATS["bf16"].kl_limit
    found = {tensor.name: tensor for tensor in read(file)}["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == "BF16"
    numbers = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type))
    assert torch.equal(numbers, weights[name].bfloat16().float())


def test_a_model_with_no_quantized_part_stays_in_16_bits(
    rounded: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "toy.gguf"
    nothing = Quantization(Grid(4, 32), False, {})
    write_form(rounded["int4"] / "model", file, kind="q4_0", name="toy", quantization=nothing)
    assert {tensor.tensor_type.name for tensor in read(file)} == {"F16", "F32"}


@pytest.mark.parametrize(
    ("grid", "form", "fix"),
    [
        (Grid(4, 16), "q4_0", "group_size: 32 with gguf-q4_0"),
        (Grid(8, 16), "q8_0", "group_size: 32 with gguf-q8_0"),
        (Grid(8, 32), "q4_0", "use gguf-q8_0 to store"),
        (Grid(4, 32), "q4_k_m", "gguf-q8_0 or gguf-q4_0 to store"),
        (Grid(8, None, floating=True), "q8_0", "safetensors"),
    ],
)
def test_a_grid_that_a_format_cannot_hold_is_reported_with_one_that_can(
    rounded: dict[str, Path], monkeypatch: pytest.MonkeyPatch, grid: Grid, form: str, fix: str
) -> None:
    monkeypatch.setattr(gguf_export, "require_llama_cpp", lambda: None)
    monkeypatch.setattr(gguf_export, "k_quantize", lambda *_, **__: None)
    model = rounded["int4"] / "model"
    config, words = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    found = [line for line in announce_gguf(form, config, words, grid) if "second time" in line[0]]
    [(text, instead)] = found
    assert grid.name in text
    assert fix in instead
    file, quantization = rounded["int4"].parent / "second.gguf", Quantization(grid, False, {})
    _, notes = write_form(model, file, kind=form, name="toy", quantization=quantization)
    assert notes == [text]


@pytest.mark.parametrize(
    ("grid", "form"), [(Grid(4, 32), "q4_0"), (Grid(4, 64), "q8_0"), (Grid(4, 16), "f16")]
)
def test_a_grid_that_a_format_can_hold_needs_no_second_rounding(grid: Grid, form: str) -> None:
    assert second_rounding(grid, form) is None


def test_a_second_rounding_weights_errors_by_moments(
    rounded: dict[str, Path], tmp_path: Path
) -> None:
    """The blocks equal those of the same model exported without its grid."""
    model = rounded["int8"] / "model"
    quantization = Quantization.load(rounded["int8"] / FILE)
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: torch.randn(scales_OG.shape[1] * 32, generator=generator).exp().square()
        for name, scales_OG in quantization.scales.items()
    }
    found = []
    for known in (quantization, None):
        file = tmp_path / "toy.gguf"
        write_form(model, file, kind="q4_0", name="toy", quantization=known, moments=moments)
        found.append({tensor.name: tensor.data.copy() for tensor in read(file)})
    assert all((found[0][name] == data).all() for name, data in found[1].items())


@pytest.mark.parametrize("form", ["q4_0", "q8_0"])
def test_gguf_without_a_grid_weights_errors_by_moments(
    rounded: dict[str, Path], tmp_path: Path, form: str
) -> None:
    """Compared with the same format without moments, as transformers reads both: the weighted error
    is larger in no matrix, and much smaller in total."""
    student = rounded["int4"].parent / "student"
    source = dict(load_model(student, dtype=torch.float32).named_parameters())
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: torch.randn(weight.shape[-1], generator=generator).exp().square()
        for name, weight in source.items()
        if weight.ndim == 2
    }
    errors = {}
    for known in (None, moments):
        file = tmp_path / f"{known is not None}.gguf"
        write_form(student, file, kind=form, name="toy", moments=known)
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, dtype=torch.float32
        )
        errors[known is not None] = {
            name: float(((weight - source[name]).detach().square() * moments[name]).sum())
            for name, weight in loaded.named_parameters()
            if name in moments
        }
    assert all(errors[True][name] < 1.01 * error for name, error in errors[False].items())
    assert sum(errors[True].values()) < 0.8 * sum(errors[False].values())


def test_the_advice_about_rounding_names_only_what_is_not_done_yet() -> None:
    advice = torchao_export._less_rounding
    assert advice(dynamic=False, dtype="float32") == "raise export.kl_limit"
    assert "float32" in advice(dynamic=False, dtype="bfloat16")
    assert "weights only" in advice(dynamic=True, dtype="float32")
