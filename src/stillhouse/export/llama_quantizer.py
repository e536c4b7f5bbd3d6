"""llama.cpp's quantizer, through llama-cpp-python: k-quants with an importance matrix.

Shapes: I inputs of a matrix.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import ModelError, first_line
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.export.gguf_model import gguf_names
from stillhouse.quantize.moments import Moments
from stillhouse.teachers.load_model import load_config
from stillhouse.teachers.model_source import AnyModel, source_of

K_BLOCK = 256
ERROR, CONTINUED = 3, 5
"""ggml's log levels for errors and for continuations of the previous line."""


def k_quantize(
    source: AnyModel, file: Path, *, kind: str, name: str, moments: Moments | None = None
) -> None:
    """Write `file` in a format of `K_QUANTS`.

    moments: E[x²] of each matrix's inputs, by the matrix's Hugging Face name, to weight rounding
        errors by.

    Raises ModelError if llama.cpp is missing or rejects the model.
    """
    require_llama_cpp()
    import llama_cpp

    float_file = file.with_suffix(".f32")
    write_gguf(source, float_file, FORMATS["f32"], name=name)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = torch.get_num_threads()
    if moments is not None:
        config = load_config(source).get_text_config()
        params.imatrix = importance_matrix(llama_cpp, moments, gguf_names(moments, config))
    with _only_errors(llama_cpp) as errors:
        failed = llama_cpp.llama_model_quantize(
            str(float_file).encode(), str(file).encode(), params
        )
    float_file.unlink()
    if failed:
        reason = " ".join(errors).strip() or f"code {failed}"
        raise ModelError(
            f"llama.cpp could not quantize this model to {kind}: {reason}",
            where=source_of(source).path,
            fix="use gguf-q4_0 or gguf-q8_0, which do not need llama.cpp",
        )


def importance_matrix(llama_cpp: Any, moments: Moments, names: Mapping[str, str]) -> Any:
    """The moments in llama.cpp's format: an array of structs that ends with an empty one."""
    entry = llama_cpp.llama_model_imatrix_data
    rows = (entry * (len(moments) + 1))()
    for place, (name, moment_I) in enumerate(moments.items()):
        # Inputs that were never active get a small weight: if all weights were 0, no rounding
        # error would count, and blocks would be arbitrary.
        positive_I = moment_I.float().clamp(min=1e-6 * float(moment_I.max()) + 1e-12)
        numbers = (ctypes.c_float * len(moment_I))(*positive_I.tolist())
        rows[place] = entry(names[name].encode(), numbers, len(moment_I))
    return rows


@contextmanager
def _only_errors(llama_cpp: Any) -> Iterator[list[str]]:
    """Within the context, silence llama.cpp, which logs a line per tensor; yield its errors."""
    errors: list[str] = []
    level = 0

    def keep(new: int, text: bytes, _data: Any) -> None:
        nonlocal level
        level = level if new == CONTINUED else new
        if level == ERROR:
            errors.append(text.decode(errors="replace").strip())

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    callback = llama_cpp.llama_log_callback(keep)  # Must stay referenced while it can be called.
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(before, data)


def has_llama_cpp() -> bool:
    """Whether llama.cpp is installed and its library loads."""
    return llama_cpp_fault() is None


def llama_cpp_fault() -> str | None:
    """Why llama.cpp cannot be used; None if it can."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "is not installed"
    try:
        importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # A library for another machine or C library, or one that lacks a function.
        return f"is installed but does not load ({first_line(error)})"
    return None


def require_llama_cpp() -> None:
    """Raise ModelError if llama-cpp-python is not installed or does not load."""
    fault = llama_cpp_fault()
    if fault is not None:
        raise ModelError(
            f"k-quants are written by llama.cpp, which {fault}",
            where="export.formats",
            fix="run pip install 'stillhouse[llama-cpp]' (compiling it takes minutes; to rebuild "
            "one that does not load, run pip install --force-reinstall --no-deps --no-cache-dir "
            "llama-cpp-python), or use gguf-q4_0 or gguf-q8_0, which do not need it",
        )
