"""Losses with a teacher that has a different tokenizer: Stillhouse's, those of
bench/sorted_losses.py, and TRL's, which run in a separate environment.

Each returns its value and the gradient with respect to the student's logits.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.sorted_losses import Gold, sorted_distance
from bench.tokenizer_problems import Side, TokenizerProblem
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, FoldedSignal, LMHead
from stillhouse.teachers.align_tokens import AlignedWindow, TokenAligner
from stillhouse.teachers.roots import merged

CHILD = Path(__file__).with_name("trl_tokenizer_losses.py")
SETTINGS: dict[str, dict[str, Any]] = {
    "trl uld": {"uld_use_hybrid_loss": False},
    "trl gold": {"uld_use_hybrid_loss": True},
    "trl gold, bayesian": {
        "uld_use_hybrid_loss": True,
        "uld_token_merge_strategy": "bayesian",
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
    },
}
"""TRL's losses with the defaults of its configuration, and with settings that make it read the rows
that predict each token and learn the end of a text."""


@dataclass(frozen=True)
class Contender:
    """A loss. divergence: its value for equal tokenizers, (log p, log q) -> value of each row; None
    if the loss does not depend on which token is which."""

    run: Callable[[TokenizerProblem], tuple[Tensor, Tensor]]
    divergence: Callable[[Tensor, Tensor], Tensor] | None


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0, dtype=log_p.dtype).log()
    return (forward_kl(log_p, log_m) + forward_kl(log_q, log_m)) / 2


def aligned(problem: TokenizerProblem) -> tuple[TokenAligner, AlignedWindow]:
    aligner = TokenAligner(problem.student.words, problem.teacher.words)
    ids_L = problem.student.ids_L.numpy()
    labels_L = np.where(np.arange(len(ids_L)) > 0, ids_L, -100)
    # The first token ends the previous text and predicts the first token of this one.
    text_L = ids_L[1:]
    (window,) = aligner.align(text_L[None], np.arange(len(text_L))[None], labels_L[1:][None])
    begins_L = np.where(window.begins_L >= 0, window.begins_L + 1, -1)
    begins_L[0] = 1  # both models begin the text
    return aligner, AlignedWindow(window.ids_M, window.positions_M, begins_L)


def stillhouse(problem: TokenizerProblem) -> tuple[Tensor, Tensor]:
    """Forward KL over shared roots, averaged over shared boundaries."""
    aligner, window = aligned(problem)
    ours, theirs = problem.student, problem.teacher
    seen = {
        (int(ids[0]), int(other[0])): 1
        for ids, other in zip(
            aligner.student.encode(problem.seen), aligner.teacher.encode(problem.seen), strict=True
        )
    }
    fold = merged(aligner.roots(), seen).fold
    covered_N = torch.from_numpy(window.begins_L >= 0)
    place_N = torch.from_numpy(window.begins_L.clip(min=1)) - 1
    eye_VV, eye_WW = (torch.eye(each.logits_LV.shape[1]).double() for each in (ours, theirs))
    dense = DenseSignal(theirs.logits_LV[place_N], LMHead(eye_WW))
    logits_LV = ours.logits_LV.clone().requires_grad_()
    found = fused_loss(
        logits_LV[:-1],
        LMHead(eye_VV),
        [Term("forward_kl")],
        signal=FoldedSignal(dense, fold, covered_N),
        scale=1 / int(covered_N.sum()),
    )
    (gradient_LV,) = torch.autograd.grad(found.total, [logits_LV])
    return found.total.detach(), gradient_LV


def sorted_loss(kind: str) -> Callable[[TokenizerProblem], tuple[Tensor, Tensor]]:
    """ULD or GOLD as published, on the rows that predict each token."""

    def run(problem: TokenizerProblem) -> tuple[Tensor, Tensor]:
        aligner, window = aligned(problem)
        logits_LV = problem.student.logits_LV.clone().requires_grad_()
        begins = np.flatnonzero(window.begins_L >= 0)
        edges = [*begins.tolist(), len(window.begins_L)]
        theirs = [*window.begins_L[begins].tolist(), len(problem.teacher.ids_L)]
        merged_GV = _merged(logits_LV, problem.student, [edge + 1 for edge in edges])
        merged_GW = _merged(problem.teacher.logits_LV, problem.teacher, theirs)
        distance: Callable[[Tensor, Tensor], Tensor] = sorted_distance
        if kind == "gold":
            distance = Gold.of(aligner.student, aligner.teacher, aligner.partners[0]).distance
        value = distance(merged_GV, merged_GW) / len(merged_GV)
        (gradient_LV,) = torch.autograd.grad(value, [logits_LV])
        return value.detach(), gradient_LV

    return run


def _merged(logits_LV: Tensor, of: Side, edges: list[int]) -> Tensor:
    """The first distribution of each chunk, times the probabilities of its other tokens. edges:
    positions of the chunks' first tokens and of the end."""
    log_LV = logits_LV.log_softmax(-1)
    rows = []
    for start, stop in pairwise(edges):
        rest = sum(log_LV[at - 1, of.ids_L[at]] for at in range(start + 1, stop))
        rows.append((log_LV[start - 1] + rest).exp())
    return torch.stack(rows)


class TRL:
    """TRL's losses, in a process of a different Python environment."""

    def __init__(self, python: Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [str(python), str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, settings: dict[str, Any], problem: TokenizerProblem) -> tuple[Tensor, Tensor]:
        sides = {
            name: {
                "tokenizer": each.words.backend_tokenizer.to_str(),
                "eos": each.words.eos_token,
                "ids": each.ids_L,
                "logits": each.logits_LV,
                "offsets": each.offsets(),
            }
            for name, each in (("student", problem.student), ("teacher", problem.teacher))
        }
        given, found = (Path(self.folder.name) / name for name in ("given.pt", "found.pt"))
        torch.save({"settings": settings, **sides}, given)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{given} {found}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("done "):
                break
        else:
            raise RuntimeError("the process with TRL has ended")
        answer = torch.load(found, weights_only=True)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"], answer["gradient"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def contenders(trl: TRL | None) -> dict[str, Contender]:
    found = {
        "stillhouse": Contender(stillhouse, forward_kl),
        "uld, as published": Contender(sorted_loss("uld"), None),
        "gold, as published": Contender(sorted_loss("gold"), jsd),
    }
    if trl is None:
        return found

    def of(settings: dict[str, Any], place: TRL) -> Contender:
        hybrid = settings["uld_use_hybrid_loss"]
        return Contender(lambda problem: place.run(settings, problem), jsd if hybrid else None)

    return found | {name: of(settings, trl) for name, settings in SETTINGS.items()}
