"""Checks that a distillation loss is correct: `python -m bench.conformance [MODULE:FUNCTION]`

Without arguments, it checks the losses of Stillhouse, TRL, Liger, and torch that are installed. It
accepts any function (Problem) -> Tensor that returns the mean over supervised rows of forward KL
(β = 0), reverse KL (β = 1), or generalized JSD, and leaves gradients to autograd: see
bench/contenders.py. It prints one line for each check that differs from a token-by-token float64
reference, and exits with status 1 if Stillhouse differs.

    python -m bench.conformance --tokenizers [PYTHON]

checks losses under a teacher with a different tokenizer (bench/tokenizer_conformance.py): ours, ULD
and GOLD as published, and TRL's if PYTHON is the interpreter of an environment with TRL.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.contenders import (
    CONTENDERS,
    Loss,
    Problem,
    defined,
    divergence_of_logits,
    installed,
    make_problem,
    quiet,
    run,
)
from bench.tokenizer_conformance import report

DEFAULT = ("stillhouse", "naive", "trl gkd", "trl chunked", "liger 1024", "orda")
TOLERANCE = 1e-4


def reference(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """Mean loss and gradients, computed token by token in float64 on the shared vocabulary."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in problem.leaves]
    hidden_ND, weight_VD = leaves
    shared = min(len(weight_VD), len(problem.teacher_VD))
    values = []
    for n in (problem.labels_N != -100).nonzero()[:, 0].tolist():
        student_V = weight_VD[:shared] @ hidden_ND[n] / problem.temperature
        teacher_V = problem.teacher_VD[:shared].double() @ problem.teacher_ND[n].double()
        teacher_V = teacher_V / problem.temperature
        values.append(divergence_of_logits(student_V[None], teacher_V[None], problem.beta)[0])
    total = torch.stack(values).mean() if values else hidden_ND.sum() * 0 + weight_VD.sum() * 0
    return total.detach(), list(torch.autograd.grad(total, leaves))


def gap(found: Tensor, expected: Tensor) -> float:
    norm = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / max(norm, 1e-6)


def compare(loss: Loss, problem: Problem, tolerance: float = TOLERANCE) -> str:
    """Describe the difference from the reference; return an empty string if there is none."""
    value = run(loss, problem)
    grads = problem.grads
    expected, expected_grads = reference(problem)
    if not (torch.isfinite(value) and all(torch.isfinite(g).all() for g in grads)):
        return "NaN or infinity"
    found = []
    off = gap(value, expected)
    if off > tolerance:
        found.append(f"loss {float(value):.5g} for {float(expected):.5g}")
    for name, got, want in zip(("hidden", "head"), grads, expected_grads, strict=True):
        off = gap(got, want)
        if off > tolerance:
            found.append(f"{name} gradient off by {off:.1%}")
    return ", ".join(found)


# --- checks: each describes the difference, or returns an empty string -----------------------


def values_and_gradients(beta: float, temperature: float) -> Callable[[Loss], str]:
    def check(loss: Loss) -> str:
        problem = make_problem(20, 40, 8, beta=beta)
        return compare(loss, replace(problem, temperature=temperature))

    return check


def one_row(loss: Loss) -> str:
    problem = make_problem(5, 40, 8)
    problem.labels_N.fill_(-100)[3] = 7
    return compare(loss, problem)


def no_rows(loss: Loss) -> str:
    problem = make_problem(5, 40, 8)
    problem.labels_N.fill_(-100)
    return compare(loss, problem)


def masked_rows_do_not_leak(loss: Loss) -> str:
    """Masked rows with huge hidden states must not change the result."""
    problem = make_problem(20, 40, 8)
    with torch.no_grad():
        problem.hidden_ND[problem.labels_N == -100] = 1e3
        problem.teacher_ND[problem.labels_N == -100] = -1e3
    return compare(loss, problem)


def split_batches_add_up(loss: Loss) -> str:
    """The means over 4 and over 400 rows, weighted by rows, must add up to the mean over 404."""
    whole = make_problem(404, 40, 8, masked=0.0)
    _, expected_grads = reference(whole)
    grads = [torch.zeros_like(g) for g in expected_grads]
    for rows in (slice(0, 4), slice(4, 404)):
        part = replace(
            whole,
            hidden_ND=whole.hidden_ND.detach()[rows].clone().requires_grad_(),
            teacher_ND=whole.teacher_ND[rows],
            labels_N=whole.labels_N[rows],
        )
        run(loss, part)
        share = len(part.labels_N) / 404
        of_hidden, of_weight = part.grads
        grads[0][rows] += of_hidden * share
        grads[1] += of_weight * share
    off = max(gap(a, b) for a, b in zip(grads, expected_grads, strict=True))
    return f"gradient off by {off:.1%}" if off > TOLERANCE else ""


def padded_head(side: str) -> Callable[[Loss], str]:
    """Padding rows of one head are not tokens and must have probability 0."""

    def check(loss: Loss) -> str:
        problem = make_problem(20, 40, 8)
        if side == "teacher":
            padding = torch.full((8, 8), 0.5)
            problem = replace(problem, teacher_VD=torch.cat([problem.teacher_VD, padding]))
        else:
            padding = torch.full((8, 8), 0.5)
            weight = torch.cat([problem.weight_VD.detach(), padding]).requires_grad_()
            problem = replace(problem, weight_VD=weight)
        return compare(loss, problem)

    return check


def underflow(beta: float) -> Callable[[Loss], str]:
    """Probabilities of e^-200 in both models, which agree on the likely tokens."""

    def check(loss: Loss) -> str:
        problem = make_problem(20, 40, 8, beta=beta)
        with torch.no_grad():
            problem.weight_VD.mul_(60)
            problem.teacher_ND.copy_(problem.hidden_ND)
            problem.teacher_VD.add_(problem.weight_VD)
        return compare(loss, problem, tolerance=1e-3)

    return check


def saturated_jsd(loss: Loss) -> str:
    """The models agree on no likely token: JSD is log 2, with a gradient far smaller than KL's."""
    problem = make_problem(20, 40, 8)
    with torch.no_grad():
        problem.weight_VD.mul_(60)
        problem.teacher_VD.mul_(60)
    value = run(loss, problem)
    expected, expected_grads = reference(problem)
    _, of_kl = reference(replace(problem, beta=0.0))
    found = [f"loss {float(value):.5g}"] if gap(value, expected) > TOLERANCE else []
    for grad, want, scale in zip(problem.grads, expected_grads, of_kl, strict=True):
        off = float((grad.double() - want).norm() / scale.norm())
        if not off < 1e-6:
            found.append(f"a gradient off by {off:.1e} of forward KL's")
    return ", ".join(found)


def bfloat16(loss: Loss) -> str:
    """Logits may be rounded to bfloat16; reductions over a vocabulary of 5000 must not."""
    problem = make_problem(40, 5000, 64, beta=0.0, dtype=torch.bfloat16)
    expected, _ = reference(problem)
    off = gap(run(loss, problem), expected)
    return f"loss off by {off:.2%}" if off > 0.005 else ""


def a_scaled_loss(loss: Loss) -> str:
    """The gradient of loss · 0.5 must be half the gradient."""
    problem = make_problem(20, 40, 8)
    _, expected = reference(problem)
    for leaf in problem.leaves:
        leaf.grad = None
    (loss(problem) * 0.5).backward()
    off = max(gap(x * 2, g) for x, g in zip(problem.grads, expected, strict=True))
    return f"gradient off by {off:.1%}" if off > TOLERANCE else ""


def without_gradients(loss: Loss) -> str:
    """Without gradients (evaluation), the value must be the same and have no graph."""
    problem = make_problem(20, 40, 8)
    expected, _ = reference(problem)
    with torch.no_grad():
        value = loss(problem)
    return "" if gap(value, expected) < TOLERANCE and not value.requires_grad else "differs"


CHECKS: dict[str, tuple[float, Callable[[Loss], str]]] = {
    **{
        f"{name}, T={t:g}": (beta, values_and_gradients(beta, t))
        for beta, name in ((0.0, "forward KL"), (1.0, "reverse KL"), (0.5, "JSD"), (0.1, "JSD 0.1"))
        for t in (1.0, 2.0)
    },
    "one supervised row": (0.5, one_row),
    "no supervised row": (0.5, no_rows),
    "masked rows do not leak": (0.5, masked_rows_do_not_leak),
    "split batches add up": (0.5, split_batches_add_up),
    "padded teacher head": (0.5, padded_head("teacher")),
    "padded student head": (0.5, padded_head("student")),
    "underflow, forward KL": (0.0, underflow(0.0)),
    "underflow, JSD": (0.5, underflow(0.5)),
    "saturated JSD": (0.5, saturated_jsd),
    "bfloat16 reductions": (0.0, bfloat16),
    "a scaled loss": (0.5, a_scaled_loss),
    "evaluation": (0.5, without_gradients),
}


def conform(loss: Loss, name: str = "") -> dict[str, str]:
    """Run all checks; return each difference, or an empty string if there is none."""
    found = {}
    for title, (beta, check) in CHECKS.items():
        if not defined(name, beta):
            continue
        try:
            found[title] = check(loss)
        except Exception as error:  # an exception of any library is a finding
            found[title] = f"raises {type(error).__name__}: {str(error).splitlines()[0][:70]}"
    return found


def find(name: str) -> Loss:
    if name in CONTENDERS:
        return CONTENDERS[name]
    module, _, function = name.partition(":")
    loss: Loss = getattr(importlib.import_module(module), function)
    return loss


def main() -> int:
    if sys.argv[1:2] == ["--tokenizers"]:
        return report(Path(sys.argv[2]) if sys.argv[2:] else None)
    names = sys.argv[1:] or [name for name in DEFAULT if installed(name)]
    failed = False
    for name in names:
        with quiet():
            found = conform(find(name), name)
        differs = {title: what for title, what in found.items() if what}
        print(f"{name}: {len(found) - len(differs)} of {len(found)} checks agree")
        for title, what in differs.items():
            print(f"    {title}: {what}")
        failed |= name == "stillhouse" and bool(differs)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
