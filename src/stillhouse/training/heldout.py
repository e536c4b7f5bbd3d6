"""Evaluation on held-out text during training, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from stillhouse.data.batches import Batch
from stillhouse.objectives import Mixture, Term
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.objective import Objective

KL = Term("forward_kl")
CROSS_ENTROPY = Term("cross_entropy")


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
