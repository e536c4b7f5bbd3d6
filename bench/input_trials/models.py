"""Tiny models of many architectures, and the functions of Stillhouse that load them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

import stillhouse as sh
from bench.input_trials import files
from bench.input_trials.chat_formats import FORMATS, tokenizer
from bench.input_trials.trial import Refusal, Trial
from stillhouse.check import check_recipe
from stillhouse.errors import ModelError
from stillhouse.signals.lm_head import head_logits

WORDS = tokenizer(FORMATS[0])
VOCABULARY = len(WORDS) + 8
"""Includes padding rows: transformers adds a token to the tokenizers of some architectures."""
LENGTH = 24
TOLERANCE = 1e-3
"""Relative to the largest logit: both sides are float32, but sum in a different order."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 8},
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, **_GEMMA, "final_logit_softcapping": 2.0},
    "gemma3_text": {**SIZES, **_GEMMA},
    "gpt2": _GPT2,
    "granite": {**SIZES, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere": {**SIZES, "logit_scale": 0.5},
    "olmo2": SIZES,
    "phi3": SIZES,
    "smollm3": SIZES,
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "qwen3_moe": {**SIZES, "head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4,
                  "num_experts_per_tok": 2},
}  # fmt: skip
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
"""Architectures with similar configurations."""
Quirk = Callable[[random.Random, Path], Trial]


# --- models ----------------------------------------------------------------------------------


@cache
def model_of(architecture: str, changes: str = "{}") -> Any:
    """Make a random model, always the same one. changes: JSON of changed configuration values."""
    sizes = {**ARCHITECTURES[architecture], **json.loads(changes)}
    config = AutoConfig.for_model(architecture, **sizes)
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def save(folder: Path, architecture: str, **changes: Any) -> Path:
    """Save a model and its tokenizer; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model_of(architecture, json.dumps(changes)).save_pretrained(folder)
    WORDS.save_pretrained(folder)
    return folder


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_logits(model: Any) -> torch.Tensor:
    return model(input_ids=_ids(), use_cache=False).logits[0].float()


def transformers_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return plain_logits(model.eval())


# --- three ways to load a model ----------------------------------------------------------------


@torch.no_grad()
def as_teacher(folder: Path) -> torch.Tensor:
    """Logits [L - 1, V], computed as in training."""
    teacher = sh.Teacher.load(folder, dtype="float32", device="cpu")
    ids = _ids()
    positions = torch.arange(LENGTH)[None]
    view = teacher.answer({"input_ids": ids, "labels": ids, "position_ids": positions})
    signal: Any = view.signals[0]
    return head_logits(signal.head, signal.hidden_ND)


def as_student(folder: Path) -> torch.Tensor:
    return plain_logits(sh.Student.pretrained(folder).model)[:-1]


def as_checked(folder: Path) -> None:
    """Run `stillhouse check` on a recipe with this model; raise the error that it reports."""
    text = "".join(f"Sentence number {n} of a text.\n\n" for n in range(400))
    files.write(folder.parent, "text.txt", text)
    raw = {
        "name": "tiny",
        "folder": str(folder.parent / "run"),
        "teacher": {"model": str(folder)},
        "data": {
            "sources": [{"kind": "text", "path": str(folder.parent / "text.txt"),
                         "documents": "blank-line"}],
            "context": 64, "heldout_tokens": 512,
        },
        "student": {"start": "random", "overrides": {}},
        "train": {"precision": "float32"},
    }  # fmt: skip
    for finding in check_recipe(raw, base=folder.parent):
        if finding.level == "error":
            raise ModelError(finding.text, where=finding.topic, fix=finding.fix)


def judged(
    name: str,
    folder: Path,
    expected: torch.Tensor | None,
    refusal: Refusal = "never",
    excused: tuple[str, ...] = (),
    *,
    door: str = "teacher",
) -> Trial:
    """A trial that is right if the logits are the expected ones (None: no logits to compare)."""
    read = {"teacher": as_teacher, "student": as_student, "check": as_checked}[door]

    def wrong(logits: torch.Tensor | None) -> str | None:
        if expected is None:
            return "accepted"
        if logits is None:
            return None
        rows = logits.shape[-1]
        difference = float((logits - expected[:-1, :rows]).abs().max())
        largest = float(expected.abs().max())
        same = difference <= TOLERANCE * largest
        return None if same else f"logits differ by {difference:.3g} of {largest:.3g}"

    return Trial(f"{name} ({door})", lambda: read(folder), wrong, refusal, excused=excused)


def refused(
    name: str, folder: Path, chance: random.Random, excused: tuple[str, ...] = (),
    *, doors: tuple[str, ...] = ("teacher", "student", "check"),
) -> Trial:  # fmt: skip
    return judged(name, folder, None, "must", excused, door=chance.choice(doors))


# --- changes ---------------------------------------------------------------------------------


def start(chance: random.Random, folder: Path, *choices: str) -> tuple[str, Path]:
    architecture = chance.choice(choices or ROTARY)
    return architecture, save(folder / "m", architecture)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def edit(path: Path, changes: dict[str, Any], file: str = "config.json") -> None:
    content = json.loads((path / file).read_text())
    content.update(changes)
    (path / file).write_text(json.dumps(content))
