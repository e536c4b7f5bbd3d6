"""Describes this installation and its capabilities for users and bug reports."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from stillhouse.hardware import choose_precision, default_device, machine, matmul_rate
from stillhouse.teachers.hashing import cache_folder

REQUIRED = (
    "stillhouse",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
)
EXTRAS = {
    "eval": ("lm_eval",),
    "quantize": ("torchao",),
    "language": ("py3langid",),
    "llama-cpp": ("llama_cpp",),
    "llm-compressor": ("compressed_tensors",),
    "vllm": ("vllm",),
    "ray": ("ray",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
"""The modules that each extra installs."""


def examination() -> Table:
    """Build a table of versions, processor, speed, memory, disk, cache, and extras."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name in REQUIRED:
        table.add_row(name, metadata.version(name))
    facts = machine()
    table.add_row("python", facts["python"])
    table.add_row("cpu", f"{facts['cpu']}, {facts['physical_cores']} cores")
    table.add_row("cpu abilities", ", ".join(facts["cpu_abilities"]) or "none")
    table.add_row("gpus", ", ".join(facts["gpus"]) or "none")
    device = default_device()
    precision = choose_precision("auto", device)
    table.add_row("precision", precision.reason)
    for dtype in (torch.float32, torch.bfloat16):
        rate = matmul_rate(dtype, device) / 1e9
        name = str(dtype).removeprefix("torch.")
        table.add_row(f"{name} matmul", f"{rate:,.0f} GFLOP/s on {device}")
    table.add_row("memory", f"{facts['memory_bytes'] / 1e9:.1f} GB")
    table.add_row("disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free")
    table.add_row("cache", Text(str(cache_folder(None))))
    table.add_row("Hub", "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "on")
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        state = f"missing: pip install 'stillhouse[{extra}]'" if missing else "installed"
        table.add_row(f"extra {extra}", Text(state))
    return table
