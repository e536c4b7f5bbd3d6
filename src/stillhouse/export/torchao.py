"""Export a quantized student as torchao tensors in safetensors, for transformers with torchao.

torchao's int4 kernels need a GPU; its tensors that also run on a CPU store one number per byte and
multiply in floating point. So this format is for transformers and for PyTorch's exporters; GGUF
files are smaller. Newer GPUs multiply float8 weights with rounded inputs directly.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.data.turn_end import stop_at_turn_end
from stillhouse.errors import ModelError, first_line
from stillhouse.export.export_formats import FLOATS
from stillhouse.export.gate import Gate, ReplayResult
from stillhouse.hardware import default_device
from stillhouse.quantize.grid import Grid, to_codes
from stillhouse.quantize.quantization import Quantization
from stillhouse.quantize.quantize import FLOAT8_WIDTH
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import AnyModel
from stillhouse.teachers.older_names import save_tokenizer, write_older_names
from stillhouse.teachers.quiet import quiet

DYNAMIC_KL = 0.05
"""Added to the limit, in nats/token, if inputs are also rounded, which the source does not do."""


def export_torchao(
    gate: Gate, out: Path, *, quantization: Quantization, dtype: str
) -> ReplayResult:
    """Write a Hugging Face folder whose quantized matrices are torchao tensors.

    gate: its source is the float32 checkpoint, with weights on the grid.
    dtype: dtype of everything else.

    Raises ModelError if torchao is missing, if this machine does not support float8 products, or if
    the export does not load or differs by more than is allowed.
    """
    require_torchao(quantization.grid, quantization.dynamic, dtype)

    out.mkdir(parents=True, exist_ok=True)
    floats = save_torchao(gate.source, out, quantization, getattr(torch, dtype))
    notes = [
        f"{name} is stored in {dtype}, because for quantized weights, transformers does not set "
        "the scale that this layer multiplies its outputs by."
        for name in floats
    ]
    limit = FLOATS[dtype] + (DYNAMIC_KL if quantization.dynamic else 0.0)
    return gate.pass_or_raise(
        out,
        format="safetensors",
        dtype=f"torchao {quantization.grid.name}, {dtype}",
        limit=limit,
        advice=_less_rounding(quantization.dynamic, dtype),
        notes=notes,
    )


def _less_rounding(dynamic: bool, dtype: str) -> str:
    """What to do if the export's rounding costs too much."""
    ways = [] if dtype == "float32" else ["export float32 (export.dtype: float32)"]
    ways += ["quantize weights only (quantize.kind without _dynamic_)"] if dynamic else []
    return " or ".join([*ways, "raise export.kl_limit"])


def require_torchao(grid: Grid, dynamic: bool, dtype: str) -> None:
    """Raise ModelError if torchao is not installed, or its tensors do not work here."""
    instead = "or export only gguf-q4_0 or gguf-q8_0, which do not need torchao"
    if grid.floating:
        instead = "or use quantize.kind int8 or int4, and export only gguf-q8_0 or gguf-q4_0"
    if importlib.util.find_spec("torchao") is None:
        raise ModelError(
            "a quantized student is written as safetensors by torchao, which is not installed",
            where="export.formats",
            fix=f"run pip install 'stillhouse[quantize]', {instead}",
        )
    try:
        _multiply(grid, dynamic, getattr(torch, dtype))
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        if grid.floating and dynamic:
            raise ModelError(
                f"float8 products in {dtype} do not run on this {_device_name()} "
                f"({first_line(error)})",
                where="quantize.kind",
                fix="use kind: float8, which rounds only weights, or int8_dynamic_int8, which also "
                "rounds inputs, on any machine; float8 products need export.dtype: bfloat16 and an "
                "NVIDIA Ada, Hopper, or newer GPU (compute capability 8.9), or an AMD MI300",
            ) from error
        raise ModelError(
            f"torchao is installed but does not work with this torch ({first_line(error)})",
            where="export.formats",
            fix=f"install a torchao version for torch {torch.__version__}, {instead}",
        ) from error


def _multiply(grid: Grid, dynamic: bool, dtype: torch.dtype) -> None:
    """Try everything that an export needs: multiply with a quantized matrix on the default device,
    and flatten it for a file."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    width, device = grid.group or FLOAT8_WIDTH, default_device()
    weight_OI = torch.ones(FLOAT8_WIDTH, width)
    quantization = Quantization(grid, dynamic, {})
    packed = _tensor(weight_OI, torch.ones(FLOAT8_WIDTH, 1), quantization, dtype, dynamic)
    rows = torch.ones(FLOAT8_WIDTH, width, dtype=dtype, device=device)
    torch.nn.functional.linear(rows, packed.to(device))
    flatten_tensor_state_dict({"layer.weight": packed})


def _device_name() -> str:
    device = default_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def save_torchao(
    source: AnyModel, out: Path, quantization: Quantization, dtype: torch.dtype
) -> list[str]:
    """Write the folder from a float32 checkpoint on the grid, without replaying it.

    Returns the names of quantized matrices that are stored as floats. When transformers loads a
    quantized matrix, it considers the matrix's whole module initialized, so buffers that are not in
    the checkpoint, such as the scale of Gemma 3's embeddings, stay uninitialized.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = load_model(source, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    weights = {name: weight.detach().to(dtype) for name, weight in parameters.items()}
    layers = set(quantization.dynamic_layers(model))
    floats = [name for name in quantization.scales if _has_other_buffers(model, name)]
    packed = {name: scales for name, scales in quantization.scales.items() if name not in floats}
    for name, scales_OG in packed.items():
        weights[name] = _tensor(parameters[name], scales_OG, quantization, dtype, name in layers)
    tensors, metadata = flatten_tensor_state_dict(weights)
    not_packed = {id(parameter) for name, parameter in parameters.items() if name not in packed}
    kept = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in not_packed
    ]
    model.config.quantization_config = _config(quantization, kept).to_dict()
    model.config.dtype = dtype
    save_file(tensors, out / "model.safetensors", metadata={**metadata, "format": "pt"})
    _sort_metadata(out / "model.safetensors")
    tokenizer = load_tokenizer(source)
    stop_at_turn_end(model, tokenizer)
    with quiet():
        model.config.save_pretrained(out)
        model.generation_config.save_pretrained(out)
    write_older_names(out)
    save_tokenizer(tokenizer, out)
    return floats


def _has_other_buffers(model: torch.nn.Module, name: str) -> bool:
    """Whether a weight's module has buffers that checkpoints do not contain."""
    module = model.get_submodule(name.rpartition(".")[0])
    return bool(module._non_persistent_buffers_set)


def _sort_metadata(file: Path) -> None:
    """Sort the metadata, whose order in safetensors varies by process, so that equal models lead to
    equal files."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(written) <= length:  # Different escaping could make it longer.
            opened.seek(8)
            opened.write(written.ljust(length))


def _tensor(
    weight_OI: Tensor, scales_OG: Tensor, quantization: Quantization, dtype: Any, dynamic: bool
) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    grid = quantization.grid
    if grid.floating:
        return _float8_tensor(weight_OI, scales_OG, grid, dtype, dynamic)
    return IntxUnpackedToInt8Tensor(
        qdata=to_codes(weight_OI, scales_OG, grid),
        scale=scales_OG.half(),
        zero_point=torch.zeros(scales_OG.shape, dtype=torch.int8),
        target_dtype=getattr(torch, grid.name),
        block_size=[1, grid.group],
        dtype=dtype,
        activation_quantization="int8_asym_per_token" if dynamic else None,
    )


def _float8_tensor(
    weight_OI: Tensor, scales_O1: Tensor, grid: Grid, dtype: Any, dynamic: bool
) -> Tensor:
    """A float8 tensor with float32 scales, which its kernels need."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    rounded: dict[str, Any] = {
        "act_quant_kwargs": QuantizeTensorToFloat8Kwargs(grid.dtype, PerRow()),
        "mm_config": Float8MMConfig(use_fast_accum=True),
    }
    return Float8Tensor(
        to_codes(weight_OI, scales_O1, grid),
        scales_O1.float(),
        block_size=[1, weight_OI.shape[-1]],
        dtype=dtype,
        **(rounded if dynamic else {}),
    )


def _config(quantization: Quantization, kept: list[str]) -> Any:
    """The quantization configuration. kept: modules whose weights are not quantized."""
    from torchao import quantization as torchao
    from transformers import TorchAoConfig

    grid, dynamic = quantization.grid, quantization.dynamic
    config: Any
    if grid.floating:
        kind = torchao.Float8WeightOnlyConfig
        if dynamic:
            kind = torchao.Float8DynamicActivationFloat8WeightConfig
        config = kind(granularity=torchao.PerRow())
    elif dynamic:
        config = torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, grid.name), weight_granularity=torchao.PerGroup(grid.group)
        )
    else:
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, grid.name), granularity=torchao.PerGroup(grid.group)
        )
    return TorchAoConfig(config, modules_to_not_convert=kept, include_input_output_embeddings=True)
