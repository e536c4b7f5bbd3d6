"""Print a model's peak memory as JSON.

`python -m stillhouse.evaluation.memory PATH DTYPE DEVICE [trust_remote_code]` runs in a separate
process because a process's peak never decreases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from stillhouse.evaluation.speed import DECODE_TOKENS, PROMPT_TOKENS, prefill_and_decode
from stillhouse.hardware import peak_memory_bytes
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import ModelSource


def main(path: str, dtype: str, device: str, *options: str) -> None:
    source = ModelSource(Path(path), trusted="trust_remote_code" in options)
    model = load_model(source, dtype=getattr(torch, dtype)).to(device)
    prompt_RL = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)
    prefill_and_decode(model, prompt_RL, DECODE_TOKENS)
    on_gpu = torch.device(device).type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory_bytes()
    sys.stdout.write(json.dumps({"peak_memory_bytes": peak}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
