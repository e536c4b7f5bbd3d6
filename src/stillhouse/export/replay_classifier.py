"""Script that replays a classifier with only transformers, torch, and safetensors.

`python -P replay_classifier.py FOLDER` reads FOLDER/request.json, and writes
FOLDER/logits.safetensors and FOLDER/answer.json. It acts as a user without Stillhouse, so it
imports nothing from Stillhouse. Each pass runs one text, or one text with one label.

Shapes: L tokens, D hidden width, N texts, C labels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    words = request["labels"] is not None
    kind = AutoModelForCausalLM if words else AutoModelForSequenceClassification
    model, info = kind.from_pretrained(
        request["exported"], dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(request["exported"], local_files_only=True)
    problems = _problems(info)
    if not problems and not words:
        problems = _tokenized_otherwise(tokenizer, request["texts"], request["rows"])
    if not problems:
        with torch.inference_mode():
            logits = [_logits(model, row, request) for row in request["rows"]]
        save_file({"logits": torch.stack(logits).cpu()}, folder / "logits.safetensors")
    (folder / "answer.json").write_text(json.dumps({"problems": problems}), encoding="utf-8")


def _problems(info: dict[str, Any]) -> list[str]:
    found = {
        "missing": {*info["missing_keys"]},
        "unexpected": {*info["unexpected_keys"]},
        "of a different shape": {str(key[0]) for key in info["mismatched_keys"]},
    }
    return [f"{what}: {', '.join(sorted(names)[:4])}" for what, names in found.items() if names]


def _tokenized_otherwise(tokenizer: Any, texts: list[str], rows: list[list[int]]) -> list[str]:
    """Describe texts with different tokens. Texts that were truncated are not compared."""
    return [
        f"tokenized differently: {text[:40]!r}"
        for text, row in zip(texts, rows, strict=True)
        if text is not None and tokenizer(text)["input_ids"] != row
    ]


def _logits(model: Any, row: Sequence[int], request: dict[str, Any]) -> Tensor:
    """The labels' logits [C] for one text."""
    if request["labels"] is not None:
        scores_C = torch.stack([_log_probability(model, row, ids) for ids in request["labels"]])
        return scores_C - torch.tensor(request["prior"], device=scores_C.device)
    ids_1L = torch.tensor([list(row)], device=model.device)
    if not request["mean_pooling"]:
        logits_C: Tensor = model(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L)).logits[0]
        return logits_C
    states_LD = model.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
    pooled_C: Tensor = model.score(states_LD.mean(0))
    return pooled_C


def _log_probability(model: Any, prompt: Sequence[int], label: Sequence[int]) -> Tensor:
    """The log-probability of a label's tokens after a prompt."""
    ids_1L = torch.tensor([[*prompt, *label]], device=model.device)
    logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits_LV.log_softmax(-1).gather(1, ids_1L[0, len(prompt) :, None]).sum()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
