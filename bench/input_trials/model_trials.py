"""Trials with model folders: valid ones of many architectures, and unusual or damaged ones.

A valid folder must produce the logits that plain transformers computes for it. A damaged folder
must be rejected, or produce the logits of the model before the damage.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from bench.input_trials import odd_configs, odd_weights
from bench.input_trials.models import (
    ARCHITECTURES,
    judged,
    model_of,
    save,
    transformers_logits,
)  # fmt: skip
from bench.input_trials.trial import Trial

QUIRKS = (*odd_weights.QUIRKS, *odd_configs.QUIRKS)


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    if number % 3 == 0:
        return sound(chance, folder, number // 3)
    return QUIRKS[(number * 2 // 3) % len(QUIRKS)](chance, folder)


def sound(chance: random.Random, folder: Path, number: int) -> Trial:
    """Go through all architectures, stored in several ways."""
    architecture = list(ARCHITECTURES)[number % len(ARCHITECTURES)]
    changes: dict[str, Any] = {}
    if architecture not in ("gpt2", "cohere", "gpt_neox", "gemma2", "gemma3_text"):
        changes["tie_word_embeddings"] = chance.random() < 0.5
    if architecture in ("llama", "qwen2", "mistral") and chance.random() < 0.5:
        changes["rope_parameters"] = _rope(chance)
    path = folder / chance.choice(["model", "my model", "m[1]", "modèle"])
    save(path, architecture, **changes)
    how = chance.choice(["plain", "sharded", "bfloat16", "no generation config", "metadata"])
    if how == "sharded":
        (path / "model.safetensors").unlink()
        model = model_of(architecture, json.dumps(changes))
        model.save_pretrained(path, max_shard_size="20KB")
    elif how == "bfloat16":
        tensors = load_file(path / "model.safetensors")
        halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(halves, path / "model.safetensors", {"format": "pt"})
    elif how == "no generation config":
        (path / "generation_config.json").unlink(missing_ok=True)
    elif how == "metadata":
        tensors = load_file(path / "model.safetensors")
        save_file(tensors, path / "model.safetensors", {"format": "pt", "x": "y"})
    door = chance.choice(["teacher", "teacher", "student", "check"])
    return judged(f"sound: {architecture} {how}", path, transformers_logits(path), door=door)


def _rope(chance: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
         "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "default", "rope_theta": 7.0},
    ]  # fmt: skip
    return chance.choice(kinds)
