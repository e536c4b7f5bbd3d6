"""DistillKit's format and loss, in the peers' environment. Imports nothing from Stillhouse.

    python -m bench.peer_distillkit JOB.json

`bench.peer_store` starts this module with DistillKit's source on the path. It writes the teacher's
top tokens as DistillKit's capture does, reads them in random batches, and trains the student on
them with DistillKit's sparse KL.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bench.peer_trainers import Report, Rows, say, settings


def write(job: dict[str, Any], compressor: Any) -> None:
    """Write one Parquet row per window, with DistillKit's own writer."""
    from distillkit.sample_common import StreamingParquetWriter, compressed_logit_schema

    windows_RL = np.load(job["windows"])
    ids_RLK = torch.from_numpy(np.load(job["ids"]))
    logprobs_RLK = torch.from_numpy(np.load(job["logprobs"]))
    k = compressor.config.k
    began = time.perf_counter()
    with StreamingParquetWriter(
        job["store"], compressed_logit_schema(), file_max_rows=256, queue_maxsize=512
    ) as writer:
        for row, (ids_LK, values_LK) in enumerate(zip(ids_RLK, logprobs_RLK, strict=True)):
            packed = compressor.compress_from_sparse(ids_LK[:, :k].long(), values_LK[:, :k])
            columns = {name: tensor.tolist() for name, tensor in packed.items()}
            writer.write({"input_ids": windows_RL[row].tolist(), **columns})
    files = list(Path(job["store"]).glob("*.parquet"))
    say(wrote=time.perf_counter() - began, bytes=sum(file.stat().st_size for file in files))


def stored(job: dict[str, Any]) -> Any:
    from datasets import load_dataset

    files = sorted(str(file) for file in Path(job["store"]).glob("*.parquet"))
    cache = str(Path(job["out"]) / "cache")
    return load_dataset("parquet", data_files=files, split="train", cache_dir=cache).with_format(
        "torch"
    )


def read(job: dict[str, Any], compressor: Any) -> None:
    """Tokens/s when reading random batches, unpacked to ids and log-probabilities."""
    rows = stored(job)
    for seed in range(job["rounds"] + 1):  # the first one warms up
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        tokens, began = 0, time.perf_counter()
        for chosen in order.split(16):
            ids, _ = compressor.decompress_to_sparse(collate([rows[int(i)] for i in chosen]))
            tokens += ids.shape[0] * ids.shape[1]
        if seed:
            say(read_tokens_per_s=tokens / (time.perf_counter() - began))


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class StoredTrainer(Trainer):
    """DistillKit's sparse KL, with missing tokens handled as in its example (`zero`)."""

    compressor: Any = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        from distillkit.lossfuncs.kl import sparse_kl_div

        ids, values = self.compressor.decompress_to_sparse(inputs)
        outputs = model(input_ids=inputs["input_ids"])
        # Position t holds the prediction of token t + 1; the last position predicts nothing.
        total = sparse_kl_div(outputs.logits[:, :-1], ids[:, :-1], values[:, :-1].float())
        loss = total / ids[:, :-1].shape[:2].numel()
        return (loss, outputs) if return_outputs else loss


def train(job: dict[str, Any], compressor: Any) -> None:
    student = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32)
    trainer = StoredTrainer(
        model=student,
        args=TrainingArguments(**settings(job)),
        train_dataset=stored(job),
        data_collator=collate,
        callbacks=[Report()],
    )
    trainer.compressor = compressor
    trainer.train()
    student.save_pretrained(Path(job["out"]) / "model")
    say(saved=True)


def main(path: Path) -> None:
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    config = DistributionQuantizationConfig.model_validate(job["compression"])
    compressor = LogprobCompressor(config=config)
    with torch.no_grad():
        write(job, compressor)
        read(job, compressor)
    train(job, compressor)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
