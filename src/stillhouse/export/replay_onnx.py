"""Script that replays an ONNX file with only onnxruntime, numpy, and safetensors.

`python -P replay_onnx.py FOLDER` reads FOLDER/request.json, and writes FOLDER/logits.safetensors
and FOLDER/answer.json. It acts as a user without Stillhouse.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import save_file


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    session = onnxruntime.InferenceSession(
        request["file"], options, providers=["CPUExecutionProvider"]
    )
    batches = [_padded(rows, request["pad"]) for rows in request["batches"]]
    session.run(None, batches[0])  # The first pass allocates memory.
    began = time.perf_counter()
    logits = [session.run(["logits"], batch)[0] for batch in batches]
    seconds = time.perf_counter() - began
    save_file({"logits": np.concatenate(logits)}, folder / "logits.safetensors")
    (folder / "answer.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


def _padded(rows: list[list[int]], pad: int) -> dict[str, Any]:
    longest = max(map(len, rows))
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
