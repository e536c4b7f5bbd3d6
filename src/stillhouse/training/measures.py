"""Metrics that are computed during training: on held-out text, and of the student's own text.

Shapes: N supervised rows of a micro-batch, n measured ones, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stillhouse.data.batches import Batch
from stillhouse.generation.own_text import entropy_of_rows, repeated_ngrams, score_rows
from stillhouse.objectives import LossSum, Mixture, Term
from stillhouse.signals import ChunkSignal, DenseSignal, FoldedSignal, LMHead, Signal
from stillhouse.signals.lm_head import folded_log_probabilities, log_probabilities
from stillhouse.signals.signal_types import inner_signal
from stillhouse.teachers.backbone import trim_head
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.objective import Objective
from stillhouse.training.rollouts import Rollout

KL = Term("forward_kl")
CROSS_ENTROPY = Term("cross_entropy")
MEASURED_ROWS = 32
"""Rows of a micro-batch that are measured, since all rows' logits would cost as much as the
loss."""


def heldout_teacher(
    teacher: Teacher | None, batches: Sequence[Batch], accelerator: Accelerator
) -> Teacher | None:
    """Return a teacher that can score these batches, or None on all processes if it cannot on one,
    since all must compute the same metrics."""
    if teacher is None:
        return None
    found = teacher.for_heldout(batches)
    able = torch.tensor(float(found is not None), device=accelerator.device)
    everywhere = float(accelerator.reduce(able)) == accelerator.num_processes
    return found if everywhere else None


@torch.no_grad()
def measure_heldout(
    model: nn.Module, teacher: Teacher | None, batches: Sequence[Batch], accelerator: Accelerator
) -> dict[str, float]:
    """Compute the perplexity, then, with a teacher, the KL to it (nats/token).

    model: a `Distillation`, or a wrapper of one. batches: this process's, on the host.
    """
    terms = [CROSS_ENTROPY] if teacher is None else [KL, CROSS_ENTROPY]
    objective = Objective(Mixture.of(*terms))
    sums = torch.zeros(len(terms) + 1, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        view = None if teacher is None else teacher.answer(batch)
        inputs = {name: each.to(accelerator.device) for name, each in batch.items()}
        outputs = model(inputs, view, objective=objective)
        names = list(outputs.terms)
        sums[:-1] += torch.stack(list(outputs.terms.values())).double()
        sums[-1] += outputs.rows
    sums = accelerator.reduce(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    metrics = {"heldout_perplexity": float(torch.tensor(means[-1]).exp())}
    if len(means) > 1:
        metrics[f"heldout_{names[0].replace('forward_kl', 'kl')}"] = means[0]
    return metrics


def measurements_since_best(rows: Sequence[Mapping[str, float]], key: str) -> int:
    """The number of measurements since the best (lowest) one. rows: of metrics.jsonl."""
    history = [row[key] for row in rows if key in row]
    return len(history) - 1 - history.index(min(history)) if history else 0


# --- own text, for the `own_` keys of metrics.jsonl ----------------------------------------------


def measure_rollouts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """For the answers of one window: their number, mean length in tokens, share that is truncated,
    and share of 4-grams that occur earlier in the same answer."""
    count = max(1, len(rollouts))
    grams = [repeated_ngrams(one.own) for one in rollouts]
    return {
        "own_answers": len(rollouts),
        "own_length": sum(len(one.own) for one in rollouts) / count,
        "own_cut_off": sum(one.cut_off for one in rollouts) / count,
        "own_repetition": sum(n for n, _ in grams) / max(1, sum(n for _, n in grams)),
    }


@torch.no_grad()
def measure_rows(
    hidden_ND: Tensor,
    head: LMHead,
    signal: Signal | ChunkSignal | None,
    targets_N: Tensor,
    vocabulary: int,
) -> LossSum:
    """Estimate sums over the rows of own text from evenly spaced rows: both KLs, the student's
    entropy, and the teacher's log-probability of the tokens (see `TokenScores`).

    With a teacher that has a different tokenizer, these are over shared roots (except the entropy),
    and estimated from the rows of `covered_N`. The loss itself is 0. signal: dense, maybe folded.
    """
    rows = len(targets_N)
    count = min(rows, MEASURED_ROWS)
    chosen_n = torch.arange(count, device=hidden_ND.device) * rows // max(1, count)
    fold = signal.fold if isinstance(signal, FoldedSignal) else None
    teacher = inner_signal(signal)
    assert isinstance(teacher, DenseSignal)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        own_nV = log_probabilities(trim_head(head, vocabulary), hidden_ND[chosen_n])
        size = vocabulary if fold is None else len(fold.teacher_W)
        theirs_nV = log_probabilities(trim_head(teacher.head, size), teacher.hidden_ND[chosen_n])
        entropy_n, targets_n = entropy_of_rows(own_nV), targets_N[chosen_n]
        if fold is not None:
            own_nV = folded_log_probabilities(own_nV, fold.student_V, fold.roots)
            theirs_nV = folded_log_probabilities(theirs_nV, fold.teacher_W, fold.roots)
            targets_n = fold.student_V[targets_n]
        found = score_rows(own_nV, theirs_nV, targets_n)._replace(entropy_N=entropy_n)
    names = ("forward_kl", "reverse_kl", "entropy", "teacher_logprob")
    weight_n = torch.ones_like(entropy_n)
    if isinstance(signal, FoldedSignal):
        weight_n = signal.covered_N[chosen_n].to(entropy_n.dtype)
    scale = rows / weight_n.sum().clamp_min(1)
    terms = {n: (c * weight_n).sum() * scale for n, c in zip(names, found, strict=True)}
    return LossSum(hidden_ND.new_zeros(()), terms, rows)
