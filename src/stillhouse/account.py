"""The compute cost of a run in floating-point operations, by the usual counting rules.

A training token costs 6 FLOPs per parameter (2 forward, 4 backward) and a forward-only token 2,
with embeddings counted once, as the head (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), and
of a mixture of experts those that a token goes through.
Attention's own products are left out: they are small at the context lengths used here.

Pruning has no such rule, so its FLOPs are counted as they are executed (`CountedFlops`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.number_format import count


@dataclass(frozen=True)
class ParameterCount:
    """total: each stored parameter once. active: those that a token is multiplied with: without an
    untied input embedding, and without the experts that it does not go through."""

    total: int
    non_embedding: int
    active: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a causal language model's parameters; a tied head counts once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is None or head.weight is embedding
    head_size = 0 if tied else head.weight.numel()
    return ParameterCount(
        total=total,
        non_embedding=total - embedding.numel() - head_size,
        active=total - (0 if tied else embedding.numel()) - _idle_parameters(model),
    )


def expert_parameters(model: nn.Module) -> int:
    """Of all routed experts of a mixture."""
    return sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)


def _idle_parameters(model: nn.Module) -> int:
    """Of the experts that a token does not go through."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 0)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not experts or not chosen:
        return 0
    return round(expert_parameters(model) * (1 - chosen / experts))


def described(model: Any) -> str:
    """A short description of a model: 134.5M parameters in bfloat16 on cuda:0."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{count(count_parameters(model).total)} parameters in {dtype} on {model.device}"


def training_flops(student: int, tokens: int) -> int:
    """FLOPs of `tokens` training tokens without a teacher; parameters counted as `active`."""
    return 6 * student * tokens


def forward_flops(parameters: int, tokens: int) -> int:
    return 2 * parameters * tokens


class CountedFlops(TorchDispatchMode):
    """Counts torch's operations inside its block, on this thread and in its backward passes.

    Every operation takes some microseconds longer: do not use it for timed code.
    flops: of the matrix products, factorizations and solves so far.

    2·m·n·k for a product, in a forward pass or for Gram matrices; n³ in total for an inverse by
    Cholesky factors, 2·n³/3 + 2·n²·k for a solve with k right-hand sides, 9·n³ for eigenvectors
    (Golub and Van Loan, Matrix Computations). Elementwise operations are left out, and so
    are attention's products if they are one fused operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0].strip("_")
        if name in ("mm", "bmm", "grouped_mm"):
            self.flops += 2 * result.numel() * args[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.flops += 2 * result.numel() * args[1].shape[-1]
        elif name in _CUBED:
            *many, n, _ = args[0].shape
            self.flops += round(math.prod(many) * _CUBED[name] * n**3)
            if name == "linalg_solve_ex":
                self.flops += 2 * n * args[1].numel()
        return result


_CUBED = {
    "linalg_cholesky_ex": 1 / 3,
    "cholesky_inverse": 2 / 3,
    "linalg_solve_ex": 2 / 3,
    "linalg_eigh": 9.0,
}
