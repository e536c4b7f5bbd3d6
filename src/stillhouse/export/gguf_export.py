"""Export GGUF files for llama.cpp and Ollama, with a Modelfile; each file is replayed first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import ModelError
from stillhouse.export.export_formats import K_QUANTS
from stillhouse.export.gate import Gate, Readers, ReplayResult
from stillhouse.export.gguf_blocks import (
    BITS,
    fitting_kind,
    for_kept,
    pack,
    pack_weighted,
    second_rounding,
)
from stillhouse.export.gguf_config import misread_by_transformers
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.export.gguf_model import family, gguf_names, unsupported
from stillhouse.export.gguf_sentencepiece import read_otherwise_by_llama_cpp
from stillhouse.export.gguf_tokenizer import read_otherwise_by_transformers, tokenizer_in_gguf
from stillhouse.export.llama_quantizer import (
    K_BLOCK,
    has_llama_cpp,
    k_quantize,
    require_llama_cpp,
)
from stillhouse.export.modelfile import modelfile
from stillhouse.export.widths import nearest, row_widths
from stillhouse.quantize.grid import Grid
from stillhouse.quantize.moments import Moments
from stillhouse.quantize.quantization import Quantization
from stillhouse.teachers.load_model import load_config, load_model, load_tokenizer
from stillhouse.teachers.model_source import AnyModel

WEIGHTED = frozenset({*K_QUANTS, "q4_0"})
"""Formats with so few bits that it is worthwhile to measure each input's importance and weight
rounding errors by it."""


def export_gguf(
    gate: Gate,
    out: Path,
    *,
    kind: str,
    name: str,
    quantization: Quantization | None = None,
    moments: Moments | None = None,
) -> ReplayResult:
    """Write `out`/NAME-KIND.gguf and a Modelfile from the gate's source, a float32 folder.

    Then transformers' GGUF loader reads the file in a fresh process, and so does llama.cpp if it is
    installed. Both are compared with the source, like every export.

    kind: a key of `FORMATS`, or of `K_QUANTS` if llama-cpp-python is installed.
    quantization: the source's quantization, if its weights are on a grid. A format that can store
        the grid then stores its numbers exactly, and other parts as 16-bit floats.
    moments: moments of every matrix's inputs. They weight rounding errors in k-quants, and in q4_0
        and q8_0 for numbers that are not on the format's grid.

    Raises ModelError if GGUF cannot store the architecture or the tokenizer, or if the export does
    not load or differs by more than is allowed.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}-{kind}.gguf"
    config = load_config(gate.source).get_text_config()
    misread = misread_by_transformers(config)
    _require_reader(misread)
    limit, notes = write_form(
        gate.source, file, kind=kind, name=name, quantization=quantization, moments=moments
    )
    (out / "Modelfile").write_text(modelfile(gate.source, file.name), encoding="utf-8")
    tokenizer = load_tokenizer(gate.source)
    held = tokenizer_in_gguf(tokenizer)
    otherwise = read_otherwise_by_transformers(held, family(config))
    reader = otherwise if misread is None else _for_llama_cpp(misread)
    chats = read_otherwise_by_llama_cpp(held, tokenizer)
    notes += [text for text in (reader, chats) if text is not None]
    return gate.pass_or_raise(
        file,
        format=f"gguf-{kind}",
        dtype=kind,
        limit=limit,
        advice=_less_rounding(kind),
        readers=Readers(otherwise is None, has_llama_cpp(), misread is None, chats is None),
        notes=notes,
    )


def _less_rounding(kind: str) -> str:
    """What to do if the rounding of a format costs too much."""
    finer = {"q8_0": "f16", "bf16": "f32", "f16": "f32"}.get(kind, "q8_0")
    if kind == "f32":
        return "raise export.kl_limit, and report this as a bug in the export"
    advice = f"use a format with more bits (gguf-{finer})"
    return advice if finer == "f32" else f"{advice}, or quantization-aware training (quantize.qat)"


def announce_gguf(
    kind: str,
    config: Any,
    tokenizer: Any,
    grid: Grid | None = None,
    *,
    layers_before: int | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield warnings, and how to avoid them, if this format cannot store a planned student exactly.

    grid: what the student is quantized to.
    layers_before: number of layers of the model that it is cut from. Which of them are kept is not
        known yet.

    Raises ModelError if the format cannot store the student at all; see `export_gguf`.
    """
    config = config.get_text_config()
    there = family(config)
    cut = layers_before not in (None, config.num_hidden_layers)
    if cut and there.rope_period:
        raise unsupported(
            f"a {config.model_type} with fewer layers: llama.cpp omits the rotary embedding in "
            f"every {there.rope_period}th layer, whichever layers were kept"
        )
    tokenizer_in_gguf(tokenizer)
    if kind not in FORMATS:
        require_llama_cpp()
    misread = misread_by_transformers(config)
    if cut and there.window_period:
        misread = misread or "which layers have a window"
    _require_reader(misread)
    if misread is not None:
        yield f"gguf-{kind}: {_for_llama_cpp(misread)}", "export safetensors for transformers"
    again = None if grid is None else second_rounding(grid, kind)
    if again is not None:
        yield again
    block = FORMATS[kind].block if kind in FORMATS else K_BLOCK
    for key, width in row_widths(config).items():
        if width % block:
            yield (
                f"gguf-{kind}: {key} {width:,} does not divide into blocks of {block}, so matrices "
                "with rows of that length are stored in a larger format",
                f"use {key} {nearest(width, block)}",
            )


def _for_llama_cpp(misread: str) -> str:
    return (
        "the file is only for llama.cpp and software that is built on it: transformers' GGUF "
        f"loader would misread {misread}"
    )


def _require_reader(misread: str | None) -> None:
    """Raise ModelError if no installed library can replay the file."""
    if misread is not None and not has_llama_cpp():
        raise ModelError(
            f"{_for_llama_cpp(misread)}, and llama.cpp is not installed to replay it",
            where="export.formats",
            fix="run pip install 'stillhouse[llama-cpp]' (compiling it takes minutes), or export "
            "safetensors",
        )


def write_form(
    source: AnyModel,
    file: Path,
    *,
    kind: str,
    name: str,
    quantization: Quantization | None = None,
    moments: Moments | None = None,
) -> tuple[float, list[str]]:
    """Write `file` like `export_gguf`, without replaying it. Raises the same ModelErrors.

    Returns the maximum KL in nats/token that the file's rounding should cost (the limit of 16-bit
    floats if the source's numbers are stored exactly or not quantized), and notes for the user.
    """
    again = None if quantization is None else second_rounding(quantization.grid, kind)
    notes = [] if again is None else [again[0]]
    if kind not in FORMATS:
        k_quantize(source, file, kind=kind, name=name, moments=moments)
        return K_QUANTS[kind], notes
    form, packed = FORMATS[kind], {}
    held = None if quantization is None else fitting_kind(quantization.grid, form)
    if held is not None or (moments is not None and {form.kind, form.embeddings} & {*BITS}):
        model = load_model(source, dtype=torch.float32)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        if quantization is not None and held is not None:
            packed = pack(weights, quantization, held)
            form = for_kept(weights, packed, form)
        elif moments is not None:
            names = gguf_names(moments, model.config.get_text_config())
            packed = pack_weighted(weights, moments, names, form)
    fallen = write_gguf(source, file, form, name=name, packed=packed)
    if fallen:
        notes.append(
            f"{len(fallen)} matrices, such as {fallen[0]}, are stored as float16 in {file.name}, "
            f"because their rows do not divide into blocks of {form.block}"
        )
    return form.kl_limit, notes
