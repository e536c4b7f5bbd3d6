"""A run's compute in FLOPs, by the usual counting rules.

A training token costs 6 FLOPs per parameter (2 forward, 4 backward); a forward-only token costs 2
(Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Embeddings count once, as the LM head; of a
mixture of experts, only the experts that process a token count. The products of attention scores
and values are left out: they are small at the context lengths used here.

No such rule exists for pruning, so its FLOPs are counted as they are executed (`CountedFlops`).
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
    """Parameter counts of a model.

    total: each stored parameter once. active: the parameters that take part in a token's matrix
    products, so not an untied input embedding, and not the experts that the token skips.
    """

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
    """Count the parameters of all routed experts of a mixture."""
    return sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)


def _idle_parameters(model: nn.Module) -> int:
    """Count the parameters of the experts that a token skips."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 0)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not experts or not chosen:
        return 0
    return round(expert_parameters(model) * (1 - chosen / experts))


def described(model: Any) -> str:
    """Describe a model briefly: 134.5M parameters in bfloat16 on cuda:0."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{count(count_parameters(model).total)} parameters in {dtype} on {model.device}"


def training_flops(student: int, tokens: int) -> int:
    """FLOPs of training a student of `student` active parameters, without the teacher's."""
    return 6 * student * tokens


def forward_flops(parameters: int, tokens: int) -> int:
    return 2 * parameters * tokens


class CountedFlops(TorchDispatchMode):
    """Counts the FLOPs of torch operations inside its block, on this thread and in its backward
    passes.

    flops: the FLOPs of the matrix products, factorizations, and solves so far. A product counts
    2·m·n·k, in a forward pass or for Gram matrices; an inverse by Cholesky factors n³ in total, a
    solve with k right-hand sides 2·n³/3 + 2·n²·k, and eigenvectors 9·n³ (Golub and Van Loan,
    Matrix Computations). Elementwise operations and fused attention are left out.

    Adds some microseconds to every operation: do not use it in timed code.
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
