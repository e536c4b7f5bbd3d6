"""A quantized student as torchao tensors in safetensors, which transformers loads with torchao.

torchao's int4 kernels want a GPU; the tensors that also run on a CPU hold one number a byte and
multiply in floating point. So this format is for transformers and for PyTorch's own exporters; the
small file is GGUF's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.export.gate import Gate, ReplayResult, fill
from stillhouse.quantize import Grid, Quantization, to_codes
from stillhouse.teachers import load_model, load_tokenizer, save_tokenizer
from stillhouse.teachers.quiet import quiet

KL_LIMITS = {"float32": 1e-6, "bfloat16": 0.01}
"""Nats a token between the checkpoint on the grid and its export: the same numbers, see
`stillhouse.export.checkpoint`."""
DYNAMIC_KL = 0.05
"""Nats a token more where inputs are rounded too, which the checkpoint does not say."""


def export_torchao(
    gate: Gate, out: Path, *, quantization: Quantization, dtype: str
) -> ReplayResult:
    """Writes a Hugging Face folder whose quantized matrices are torchao tensors.

    gate: its source is the float32 checkpoint on the grid. dtype: of everything else.
    Raises ModelError: torchao is missing, an export that does not load or differs by more than is
    allowed. RunError: no space, no permission, `out` has files already.
    """
    require_torchao()

    def work(folder: Path) -> ReplayResult:
        code = gate.trust_remote_code
        kind = getattr(torch, dtype)
        save_torchao(gate.source, folder, quantization, kind, trust_remote_code=code)
        limit = KL_LIMITS[dtype] + (DYNAMIC_KL if quantization.dynamic else 0.0)
        return gate.pass_or_raise(
            folder,
            list(folder.glob("*.safetensors")),
            format="safetensors",
            dtype=f"torchao int{quantization.grid.bits}, {dtype}",
            limit=limit,
            advice="export float32 (export.dtype: float32), or quantize weights only",
        )

    return fill(out, work)


def require_torchao() -> None:
    """Raises ModelError where torchao is not installed, or its tensors do not work here."""
    instead = "or export gguf-q4_0 or gguf-q8_0 alone, which need no torchao"
    if importlib.util.find_spec("torchao") is None:
        raise ModelError(
            "a quantized student is written as safetensors by torchao, which is not installed",
            where="export.formats",
            fix=f"pip install 'stillhouse[quantize]', {instead}",
        )
    try:
        _multiply()
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"torchao is installed and does not work with this torch ({first[0]})",
            where="export.formats",
            fix=f"install a torchao made for torch {torch.__version__}, {instead}",
        ) from error


def _multiply() -> None:
    """A product with a quantized matrix, and what writes it: all that an export takes."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    quantization = Quantization(Grid(4, 32), True, {})
    weight_OI = torch.ones(2, 32)
    packed = _tensor(weight_OI, torch.ones(2, 1), quantization, torch.float32, True)
    torch.nn.functional.linear(torch.ones(1, 32), packed)
    flatten_tensor_state_dict({"layer.weight": packed})


def save_torchao(
    source: Path,
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Writes the folder, of a float32 checkpoint on the grid, without replaying it."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = load_model(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    weights: dict[str, Tensor] = {
        name: weight.detach().to(dtype) for name, weight in model.named_parameters()
    }
    layers = set(quantization.linear_layers(model)) if quantization.dynamic else set()
    whole = dict(model.named_parameters())
    for name, scales_OG in quantization.scales.items():
        weights[name] = _tensor(whole[name], scales_OG, quantization, dtype, name in layers)
    tensors, metadata = flatten_tensor_state_dict(weights)
    model.config.quantization_config = _config(quantization, weights).to_dict()
    model.config.dtype = dtype
    save_file(tensors, out / "model.safetensors", metadata={**metadata, "format": "pt"})
    with quiet():
        model.config.save_pretrained(out)
        model.generation_config.save_pretrained(out)
    save_tokenizer(load_tokenizer(source, trust_remote_code=trust_remote_code), out)


def _tensor(
    weight_OI: Tensor, scales_OG: Tensor, quantization: Quantization, dtype: Any, dynamic: bool
) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    grid = quantization.grid
    return IntxUnpackedToInt8Tensor(
        qdata=to_codes(weight_OI, scales_OG, grid),
        scale=scales_OG.half(),
        zero_point=torch.zeros(scales_OG.shape, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{grid.bits}"),
        block_size=[1, grid.group],
        dtype=dtype,
        activation_quantization="int8_asym_per_token" if dynamic else None,
    )


def _config(quantization: Quantization, weights: dict[str, Tensor]) -> Any:
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from transformers import TorchAoConfig

    grid = quantization.grid
    kind, group = getattr(torch, f"int{grid.bits}"), PerGroup(grid.group)
    config = (
        Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=group)
        if quantization.dynamic
        else IntxWeightOnlyConfig(weight_dtype=kind, granularity=group)
    )
    kept = [name.removesuffix(".weight") for name in weights if name not in quantization.scales]
    return TorchAoConfig(config, modules_to_not_convert=kept, include_input_output_embeddings=True)
