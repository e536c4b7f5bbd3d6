"""Time and memory of the fused loss, compared with other losses: `python -m bench.losses`.

Every figure is measured in a separate process. Times: after a check that all contenders compute the
same loss and gradients, each contender runs forward and backward in turn, in an order that rotates
from round to round. The minimum over the rounds counts; all times are recorded. Memory: the peak
resident memory (on a GPU: allocated memory) during one forward and backward pass, minus the memory
before it, after compilers and libraries have been set up. Gradients are included. The floor is the
time of the four matrix products alone, in the same dtype.

`--device cuda` measures N = 8192 at four shapes in bfloat16 and adds the roofline: the products'
FLOPs divided by the time and by the rate of one large product.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

import torch

from bench.common import Bar, write_results
from bench.contenders import (
    CONTENDERS,
    Problem,
    defined,
    installed,
    make_problem,
    matmul_floor,
    quiet,
    run,
    stillhouse,
    term_for,
)
from stillhouse.hardware import (
    free_memory,
    matmul_rate,
    peak_memory_bytes,
    reset_peak_memory,
    synchronize,
    tune_allocator,
)
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, LMHead, SparseSignal

NAMES = {0.0: "forward KL", 0.5: "JSD"}
PEERS = [name for name in CONTENDERS if name != "stillhouse"]
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.05}
FLOOR_ROWS = {"cpu": (256, 512), "cuda": (2048,)}
CUDA_ROWS = 8192
CUDA_SHAPES = ((128_000, 2048), (128_000, 4096), (256_000, 2048), (256_000, 4096))
"""(vocabulary, width)"""
SEED = 0
WRAP_HELP = "put before each measuring command, e.g. 'taskset -c 0,1'; or set BENCH_WRAP"


def seconds(work: Callable[[], object], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def rounds_of(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Time all contenders, in an order that rotates from round to round."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(contenders[name], device))
    return times


def problem_of(options: argparse.Namespace, **changes: Any) -> Problem:
    return make_problem(
        options.rows,
        options.vocab,
        options.width,
        **{
            "masked": options.masked,
            "beta": options.beta,
            "dtype": getattr(torch, options.dtype),
            "device": options.device,
            "seed": SEED,
            **changes,
        },
    )


# --- measurements in one process -----------------------------------------------------------


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    problem = problem_of(options)
    wanted = [n for n in CONTENDERS if installed(n) and defined(n, options.beta)]
    # Kept outside the problem, so that the next contender cannot overwrite them.
    reference = [run(stillhouse, problem), *(grad.clone() for grad in problem.grads)]
    agreement: dict[str, str | list[float]] = {}
    contenders: dict[str, Callable[[], object]] = {}
    for name in wanted:
        try:
            computed = [run(CONTENDERS[name], problem), *problem.grads]
        except RuntimeError as error:  # a contender that does not support this dtype or device
            agreement[name] = f"does not run: {str(error).splitlines()[0]}"
            continue
        gaps = [
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(computed, reference, strict=True)
        ]
        agreement[name] = gaps
        if max(gaps) > AGREEMENT[options.dtype]:
            print(f"{name} computes a different loss or gradient: {gaps}", file=sys.stderr)
            continue
        contenders[name] = partial(run, CONTENDERS[name], problem)
    for rows in FLOOR_ROWS[options.device]:
        contenders[f"floor {rows}"] = partial(matmul_floor, problem, rows)
    rounds_of({n: c for n, c in contenders.items() if n.startswith("floor")}, 1, options.device)
    times = rounds_of(contenders, options.rounds, options.device)
    found: dict[str, Any] = {"relative_gaps_of_loss_and_gradients": agreement, "seconds": times}
    if options.device == "cuda":
        supervised = int((problem.labels_N != -100).sum())
        found["operations"] = 8 * supervised * options.vocab * options.width
        found["operations_per_second"] = matmul_rate(getattr(torch, options.dtype), options.device)
    return found


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    problem = problem_of(options)
    runs = [_peak_of_one(options, problem) for _ in range(4)]
    return {"bytes": min(runs[1:]), "first_run": runs[0]}  # the first run sets up compilers


def _peak_of_one(options: argparse.Namespace, problem: Problem) -> int:
    loss = CONTENDERS[options.contender]
    for leaf in problem.leaves:
        leaf.grad = None
    free_memory()  # otherwise a contender could reuse freed memory without being counted
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(loss, problem)
        return torch.cuda.max_memory_allocated() - before
    reset_peak_memory()
    before = peak_memory_bytes()
    run(loss, problem)
    return peak_memory_bytes() - before


def measure_fractions(options: argparse.Namespace) -> dict[str, Any]:
    problems = {f: problem_of(options, masked=1 - f) for f in (0.1, 0.5, 1.0)}
    contenders = {str(f): partial(run, stillhouse, p) for f, p in problems.items()}
    rounds_of(contenders, 1, options.device)
    return {"seconds": rounds_of(contenders, options.rounds, options.device)}


def measure_sparse(options: argparse.Namespace) -> dict[str, Any]:
    problem = problem_of(options, masked=0.0)
    term = term_for(options.beta)
    sparse_parts = []
    with torch.no_grad():
        for rows in problem.teacher_ND.split(128):
            log_p = torch.log_softmax((rows @ problem.teacher_VD.T).float(), -1)
            top = log_p.topk(64)
            sparse_parts.append(
                (top.indices, top.values, (1 - top.values.exp().sum(-1)).clamp_min(0))
            )
    indices, values, tails = zip(*sparse_parts, strict=True)
    sparse = SparseSignal(torch.cat(indices), torch.cat(values), torch.cat(tails))
    dense = DenseSignal(problem.teacher_ND, LMHead(problem.teacher_VD))

    def of(signal: DenseSignal | SparseSignal) -> Callable[[], object]:
        def loss(p: Problem) -> torch.Tensor:
            return fused_loss(p.hidden_ND, LMHead(p.weight_VD), [term], signal=signal).total

        return lambda: run(loss, problem)

    contenders = {"dense": of(dense), "sparse": of(sparse)}
    rounds_of(contenders, 1, options.device)
    return {"seconds": rounds_of(contenders, options.rounds, options.device)}


def measure_step(options: argparse.Namespace) -> dict[str, Any]:
    """Time a distillation step and a plain fine-tuning step of the same student."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype, device = getattr(torch, options.dtype), options.device
    torch.manual_seed(SEED)

    def model(layers: int) -> Any:
        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=options.vocab,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(device, dtype)

    teacher, student = model(16).eval(), model(8)
    ids_RL = torch.randint(0, options.vocab, (8, options.rows // 8), device=device)

    def step(distill: bool) -> None:
        student.zero_grad(set_to_none=True)
        signal = None
        if distill:
            with torch.no_grad():
                hidden_ND = teacher.model(ids_RL).last_hidden_state[:, :-1].flatten(0, 1)
            signal = DenseSignal(hidden_ND, LMHead(teacher.lm_head.weight))
        hidden_ND = student.model(ids_RL).last_hidden_state[:, :-1].flatten(0, 1)
        fused_loss(
            hidden_ND,
            LMHead(student.lm_head.weight),
            [Term("forward_kl" if distill else "cross_entropy")],
            signal=signal,
            targets_N=ids_RL[:, 1:].flatten(),
            scale=1.0 / len(hidden_ND),
        ).total.backward()

    contenders = {"distillation": lambda: step(True), "fine-tuning": lambda: step(False)}
    rounds_of(contenders, 1, device)
    counts = [sum(p.numel() for p in m.parameters()) for m in (student, teacher)]
    return {
        "seconds": rounds_of(contenders, options.rounds, device),
        "student_parameters": counts[0],
        "teacher_parameters": counts[1],
    }


MEASURES = {
    "time": measure_time,
    "memory": measure_memory,
    "fractions": measure_fractions,
    "sparse": measure_sparse,
    "step": measure_step,
}


# --- all measurements ----------------------------------------------------------------------


def ask(options: argparse.Namespace, measure: str, **changes: Any) -> dict[str, Any]:
    """Run one measurement in a separate process."""
    settings = {**vars(options), **changes, "measure": measure}
    settings.pop("wrap")
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [*shlex.split(options.wrap), sys.executable, "-m", "bench.losses", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300]}
    result = json.loads(done.stdout.splitlines()[-1])
    print(measure, changes, json.dumps(result.get("seconds", result)), flush=True)
    return result


def best(times: dict[str, list[float]], prefix: str) -> float:
    """Return the minimum over all rounds of contenders whose name starts with this prefix."""
    return min(min(values) for name, values in times.items() if name.startswith(prefix))


def ask_memory(options: argparse.Namespace, **changes: Any) -> dict[str, dict[str, Any]]:
    return {
        name: ask(options, "memory", contender=name, **changes)
        for name in CONTENDERS
        if installed(name) and defined(name, changes["beta"])
    }


def time_bars(key: str, got: dict[str, Any], bar: float) -> list[Bar]:
    """Return the bars; add to `got` the ratio that a loss of only the four products would reach."""
    times = got["seconds"]
    ours, floor = best(times, "stillhouse"), best(times, "floor")
    peers = {name: min(v) for name, v in times.items() if name in PEERS}
    fastest = min(peers, key=lambda name: peers[name])
    got["floor_over_fastest_peer"] = floor / peers[fastest]
    return [
        Bar(f"{key}: time / fastest peer ({fastest})", ours / peers[fastest], "<=", bar),
        Bar(f"{key}: matmul floor / time", floor / ours, ">=", 0.8),
    ]


def memory_bars(kind: str, memory: dict[str, dict[str, Any]], of_best: float = 1 / 4) -> list[Bar]:
    found = {name: got["bytes"] for name, got in memory.items() if "bytes" in got}
    ours = found.pop("stillhouse")
    bars = []
    if "trl gkd" in found:
        bars.append(Bar(f"{kind}: peak / TRL GKD", ours / found["trl gkd"], "<=", 1 / 30))
    if found:
        name = min(found, key=lambda peer: found[peer])
        bars.append(Bar(f"{kind}: peak / best peer ({name})", ours / found[name], "<=", of_best))
    return bars


def other_bars(figures: dict[str, Any]) -> list[Bar]:
    fractions = figures["fractions"]["seconds"]
    whole = min(fractions["1.0"])
    bars = [
        Bar(
            f"time at {f} supervised / {f} of the time at 1",
            min(fractions[f]) / whole / float(f),
            "<=",
            1.15,
        )
        for f in ("0.1", "0.5")
    ]
    for kind in NAMES.values():
        sparse = figures[f"sparse {kind}"]["seconds"]
        ratio = min(sparse["sparse"]) / min(sparse["dense"])
        bars.append(Bar(f"{kind}: sparse (K=64 + tail) / dense", ratio, "<=", 0.8))
    step = figures["step"]
    expected = 1 + step["teacher_parameters"] / (3 * step["student_parameters"])
    ratio = min(step["seconds"]["distillation"]) / min(step["seconds"]["fine-tuning"])
    bars.append(Bar("distillation step / fine-tuning step, over 1 + P_t/3P_s", ratio / expected,
                    "<=", 1.1))  # fmt: skip
    return bars


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--masked", type=float, default=0.25)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--allocator", default="tuned", choices=["tuned", "default"])
    parser.add_argument("--contender", default="stillhouse")
    parser.add_argument("--measure", choices=MEASURES, help="run one measurement in this process")
    parser.add_argument("--wrap", default=os.environ.get("BENCH_WRAP", ""), help=WRAP_HELP)
    options = parser.parse_args()
    if options.measure:
        if options.allocator == "tuned" and options.measure != "memory":
            tune_allocator()
        with quiet():
            print(json.dumps(MEASURES[options.measure](options)))
        return
    figures: dict[str, Any] = {
        "settings": {k: v for k, v in vars(options).items() if k != "wrap"},
        "peers": {name: _version(name) for name in ("trl", "liger-kernel", "orda-kernel")},
    }
    measure = measure_cpu if options.device == "cpu" else measure_cuda
    bars = measure(options, figures)
    name = "losses" if options.device == "cpu" else "losses-cuda"
    write_results(name, figures, bars, seeds=[SEED])


def measure_cpu(options: argparse.Namespace, figures: dict[str, Any]) -> list[Bar]:
    bars: list[Bar] = []
    for beta, kind in NAMES.items():
        bar = 0.45 if beta == 0.5 else 0.65
        for dtype in ("float32", "bfloat16"):
            key = f"{kind} {dtype}"
            figures[f"time {key}"] = got = ask(options, "time", beta=beta, dtype=dtype)
            bars += time_bars(key, got, bar)
            figures[f"memory {key}"] = memory = ask_memory(options, beta=beta, dtype=dtype)
            bars += memory_bars(key, memory)
            key += ", allocator as it is"
            figures[f"time {key}"] = got = ask(
                options, "time", beta=beta, dtype=dtype, allocator="default"
            )
            bars += time_bars(key, got, bar)
        figures[f"sparse {kind}"] = ask(options, "sparse", beta=beta)
    figures["fractions"] = ask(options, "fractions", beta=0.0)
    figures["step"] = ask(options, "step", dtype="float32", rows=1024)
    return bars + other_bars(figures)


def measure_cuda(options: argparse.Namespace, figures: dict[str, Any]) -> list[Bar]:
    bars: list[Bar] = []
    for beta, kind in NAMES.items():
        for vocab, width in CUDA_SHAPES:
            shape = {
                "beta": beta,
                "dtype": "bfloat16",
                "rows": CUDA_ROWS,
                "vocab": vocab,
                "width": width,
            }
            key = f"{kind}, V={vocab}, d={width}"
            figures[f"time {key}"] = got = ask(options, "time", **shape)
            seconds = best(got["seconds"], "stillhouse")
            share = got["operations"] / seconds / got["operations_per_second"]
            bars.append(Bar(f"{key}: share of the roofline", share, ">=", 0.6))
            figures[f"memory {key}"] = memory = ask_memory(options, **shape)
            bars += [bar for bar in memory_bars(key, memory, 1 / 2) if "best peer" in bar.name]
    return bars


if __name__ == "__main__":
    main()
