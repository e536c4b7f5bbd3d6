"""Export a classifier as an ONNX file, which is replayed in onnxruntime.

Shapes: B texts in a batch, L tokens, N texts, C labels.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, first_line
from stillhouse.export.export_formats import ONNX
from stillhouse.export.fresh_process import run_script
from stillhouse.progress import note
from stillhouse.teachers.quiet import quiet

FILE = "model.onnx"
MODULES = ("onnx", "onnxscript", "onnxruntime")
INPUTS = ("input_ids", "attention_mask")
LARGEST = 2**31
"""Maximum bytes of an ONNX file, which is one protobuf message. Before rounding, its numbers are
float32."""


@dataclass(frozen=True)
class OnnxReplay:
    """How an ONNX file in onnxruntime compares with its float32 checkpoint.

    kl: mean KL(checkpoint ‖ file) in nats/text.
    kl_limit: the maximum allowed.
    top1_agreement: fraction of texts with the same top-1 label.
    texts: number of texts.
    texts_per_s: on a CPU, in the batches of the comparison.
    """

    format: str
    bytes: int
    kl: float
    kl_limit: float
    top1_agreement: float
    texts: int
    texts_per_s: float


Read = Callable[[Any, Tensor, Tensor], Tensor]
"""Computes a model's logits [B, C] from token ids and attention mask, [B, L] each."""


def export_onnx(
    model: Any,
    batches: Sequence[Sequence[Sequence[int]]],
    pad: int,
    expected_NC: Tensor,
    out: Path,
    *,
    form: str,
    source: Path,
    read: Read,
    kl_limit: float | None = None,
) -> OnnxReplay:
    """Write `out`/model.onnx, which maps token ids and attention mask [B, L] to logits [B, C], and
    replay it.

    Args:
        model: a transformers classifier, in float32, on the CPU.
        batches: token ids of the texts to compare on.
        pad: token id that pads the rows of a batch.
        expected_NC: the checkpoint's probabilities for these texts, in order.
        form: "onnx", or "onnx-int8", with weights of products in 8 bits, and their inputs rounded
            at run time.
        source: the checkpoint's folder, for error messages.
        read: computes the model's logits.
        kl_limit: maximum KL in nats/text; None: the format's default.

    Raises:
        ModelError: a package is missing, the model cannot be exported, or the file does not run or
            differs by more than is allowed.
    """
    require_onnx(sum(parameter.numel() for parameter in model.parameters()))
    out.mkdir(parents=True, exist_ok=True)
    file = out / FILE
    _write(model, read, file, source)
    if form == "onnx-int8":
        _round(file)
    note(f"Replaying the {form} export in onnxruntime, in a fresh process")
    found = run_script(
        "replay_onnx.py",
        {
            "file": str(file.resolve()),
            "batches": [[list(row) for row in batch] for batch in batches],
            "pad": pad,
            "threads": torch.get_num_threads(),
        },
        what="onnxruntime cannot run the exported file",
        where=source,
        fix="export only safetensors, and report this with the model's config.json",
    )
    p_NC = expected_NC.double()
    p_NC = p_NC / p_NC.sum(-1, keepdim=True)  # In float32, the sum was only nearly 1.
    log_q_NC = found["logits"].double().log_softmax(-1)
    kl = float(torch.xlogy(p_NC, p_NC).sub(p_NC * log_q_NC).sum(-1).mean())
    limit = ONNX[form] if kl_limit is None else kl_limit
    if not kl <= limit:  # NaN also fails.
        raise ModelError(
            f"the {form} file differs from its checkpoint by {kl:.3g} nats/text on "
            f"{len(p_NC)} texts; at most {limit:g} is allowed",
            where=source,
            fix=f"export {'onnx' if form == 'onnx-int8' else 'only safetensors'}, or raise "
            "export.kl_limit",
        )
    return OnnxReplay(
        format=form,
        bytes=file.stat().st_size,
        kl=kl,
        kl_limit=limit,
        top1_agreement=float((p_NC.argmax(-1) == log_q_NC.argmax(-1)).double().mean()),
        texts=len(p_NC),
        texts_per_s=len(p_NC) / found["seconds"],
    )


def require_onnx(parameters: int) -> None:
    """Raise ModelError if a required package is not installed, or a model with this many parameters
    is too large for an ONNX file."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"an ONNX export needs {', '.join(missing)}, which is not installed",
            where="export.formats",
            fix="run pip install 'stillhouse[onnx]', or export only safetensors",
        )
    if parameters * 4 > LARGEST:
        raise ModelError(
            f"{parameters:,} parameters in float32 exceed the 2 GiB limit of ONNX files",
            where="export.formats",
            fix=f"use a student with at most {LARGEST // 4:,} parameters, or export only "
            "safetensors",
        )


class _Logits(nn.Module):
    def __init__(self, model: Any, read: Read) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.read(self.model, input_ids, attention_mask)


def _write(model: Any, read: Read, file: Path, source: Path) -> None:
    # The example has three texts with seven tokens, because sizes of 1 would become constants.
    ids_BL = torch.ones(3, 7, dtype=torch.long)
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    try:
        with quiet(), _silenced():
            torch.onnx.export(
                _Logits(model.eval(), read),
                (ids_BL, torch.ones_like(ids_BL)),
                file,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(INPUTS, sizes),
                input_names=list(INPUTS),
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"torch cannot export {type(model).__name__} to ONNX: {first_line(error)}",
            where=source,
            fix="export only safetensors, or use a student that torch.onnx supports, such as BERT, "
            "ModernBERT, or Llama",
        ) from error


def _round(file: Path) -> None:
    """Round the embeddings and the weights of matrix products to 8 bits; the latter with one scale
    per output."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = file.with_suffix(".prepared.onnx")
    with _silenced():
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            file,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    prepared.unlink()


@contextmanager
def _silenced() -> Iterator[None]:
    """Within the context, silence exporters' warnings about packages and rewrites, which do not
    concern users."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(level)
