"""Script for an environment with llm-compressor that converts a checkpoint to compressed-tensors.

`python -P llm_compressor.py FOLDER` reads FOLDER/request.json and FOLDER/windows.safetensors, and
writes the compressed checkpoint. It imports nothing from Stillhouse, since llm-compressor needs a
different version of transformers, and therefore a separate environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCHEMES = {"gptq": "W4A16", "awq": "W4A16", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4"}
"""llm-compressor's names for 4 bits in groups, FP8 with one scale per output and per token, and
NVFP4 with two levels of scales."""


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        request["source"], dtype=torch.bfloat16, local_files_only=True
    )
    method = request["method"]
    scheme = preset_name_to_scheme(SCHEMES[method], ["Linear"])
    if request["group_size"] is not None:
        scheme.weights.group_size = request["group_size"]
    options = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipe: list[Any] = [GPTQModifier(**options)]
    if method != "gptq":
        recipe = [QuantizationModifier(**options)]
    if method == "awq":
        recipe.insert(0, AWQModifier())
        if not torch.accelerator.is_available():
            # Pinned memory is for copies to an accelerator; without one, torch cannot pin memory.
            IntermediatesCache.pin_memory = lambda *_, **__: None
    tokenizer = request["source"]
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **_calibration(method, folder))
    model.save_pretrained(request["out"], save_compressed=True)


def _calibration(method: str, folder: Path) -> dict[str, Any]:
    """Options for calibration on token windows, for methods that need layer inputs."""
    if method == "fp8":
        return {}
    rows = [ids_L.tolist() for ids_L in load_file(folder / "windows.safetensors").values()]
    masks = [[1] * len(row) for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": masks})
    return {
        "dataset": dataset,
        "num_calibration_samples": len(rows),
        "max_seq_length": max(map(len, rows)),
        "shuffle_calibration_samples": False,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
