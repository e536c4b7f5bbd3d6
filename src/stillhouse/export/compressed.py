"""Export a student quantized by llm-compressor as compressed-tensors, for vLLM and transformers.

llm-compressor requires an older version of transformers than Stillhouse, so it needs a separate
environment. The recipe names its Python, which runs `llm_compressor.py`.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.data.shift import text_end
from stillhouse.errors import ModelError
from stillhouse.export.export_formats import COMPRESSED
from stillhouse.export.fresh_process import run_script
from stillhouse.export.gate import Gate, ReplayResult
from stillhouse.export.widths import nearest, row_widths
from stillhouse.progress import note
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.older_names import save_tokenizer, write_older_names

_HAS_LLM_COMPRESSOR = "import importlib.util as u; print(u.find_spec('llmcompressor') and 1)"


def export_compressed(
    gate: Gate, out: Path, *, method: str, python: str | None, windows: Sequence[Any]
) -> ReplayResult:
    """Write a Hugging Face folder with all linear layers except the head quantized by `method`.

    method: a key of `COMPRESSED`.
    python: a Python interpreter with llm-compressor.
    windows: training text on which GPTQ, AWQ, and NVFP4 measure layer inputs.

    Raises ModelError if a package is missing, llm-compressor fails, or the export does not load or
    differs by more than is allowed.
    """
    interpreter = require_llm_compressor(python)

    out.mkdir(parents=True, exist_ok=True)
    note(f"llm-compressor: {method}")
    run_script(
        "llm_compressor.py",
        {
            "source": str(gate.folder.resolve()),
            "out": str(out),
            "method": method,
            "group_size": fitting_group(method, load_config(gate.source)),
        },
        windows={
            str(place): window["input_ids"][: text_end(window["labels"])]
            for place, window in enumerate(windows)
        },
        python=interpreter,
        what=f"llm-compressor could not quantize this model with {method}",
        where=gate.folder,
        fix="check that its environment supports this architecture, or export safetensors or "
        "gguf-*, which do not need llm-compressor",
    )
    write_older_names(out)
    save_tokenizer(load_tokenizer(gate.source), out)
    return gate.pass_or_raise(
        out,
        format=f"compressed-{method}",
        dtype=method,
        limit=COMPRESSED[method].kl_limit,
        advice="use compressed-fp8, or quantization-aware training and gguf-q4_0 (quantize.qat)",
    )


def require_llm_compressor(python: str | None) -> str:
    """Return the interpreter. Raises ModelError if none is named, if it lacks llm-compressor, or if
    this Python lacks the package that reads its files."""
    where = "export.llm_compressor"
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ModelError(
            "compressed-tensors, which is needed to replay these files, is not installed",
            where="export.formats",
            fix="run pip install 'stillhouse[llm-compressor]', or export safetensors or gguf-*",
        )
    if python is None:
        raise ModelError(
            "llm-compressor needs a separate environment, but the recipe names none",
            where=where,
            fix="run python -m venv llmc && llmc/bin/pip install llmcompressor, and set "
            "export.llm_compressor: llmc/bin/python",
        )
    try:
        done = subprocess.run(
            [python, "-P", "-c", _HAS_LLM_COMPRESSOR],  # -P, which `run_script` uses, is from 3.11
            capture_output=True,
            text=True,
            check=False,
        )
        found = done.stdout.strip() == "1"
    except OSError:
        found = False
    if not found:
        raise ModelError(
            f"{python} is not a Python interpreter (3.11 or newer) with llm-compressor",
            where=where,
            fix="install it in that environment: pip install llmcompressor",
        )
    return python


def fitting_group(method: str, config: Any) -> int | None:
    """The method's largest group size that divides the model's widths; None if the method has no
    groups, or none fits (see `announce_compressed`)."""
    widths = row_widths(config).values()
    fitting = [g for g in COMPRESSED[method].groups if not any(width % g for width in widths)]
    return fitting[0] if fitting else None


def announce_compressed(method: str, config: Any) -> tuple[str, str] | None:
    """An error, and how to avoid it, if this method cannot store a planned student; else None."""
    if not COMPRESSED[method].groups or fitting_group(method, config) is not None:
        return None
    group = COMPRESSED[method].groups[-1]
    key, width = next((key, width) for key, width in row_widths(config).items() if width % group)
    return (
        f"compressed-{method}: {key} {width:,} does not divide into groups of {group}",
        f"use {key} {nearest(width, group)}, or compressed-fp8, which has no groups",
    )
