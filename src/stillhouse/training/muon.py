"""A recipe's optimizer: Muon for the matrices of a student's layers and AdamW for everything else,
or AdamW alone.

Jordan et al., Muon: An optimizer for hidden layers in neural networks
(https://kellerjordan.github.io/posts/muon/). Updates are scaled to the size of AdamW's, as in Liu
et al., Muon is Scalable for LLM Training (arXiv:2502.16982), so both can share a learning rate.

Shapes: [M, N] for a matrix, [E, M, N] for a stack of matrices (fused experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stillhouse.processes import first_row, local_part
from stillhouse.training.compact_adamw import CompactAdamW, rounded, rounding_key
from stillhouse.training.distillation import Distillation
from stillhouse.training.train_config import TrainRecipe

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's polynomial, which brings singular values to between about 0.7 and 1.2 in five
iterations."""
ITERATIONS = 5
MOMENTUM = 0.95
ADAMW_SIZE = 0.2
"""RMS of AdamW's updates at a learning rate of 1 (arXiv:2502.16982, section 2.2)."""


@dataclass(frozen=True)
class _Matrix:
    """A weight that Muon steps. number: its index among all weights, for stochastic rounding."""

    weight: Tensor
    group: dict[str, Any]
    state: dict[str, Tensor]
    number: int

    def update(self) -> Tensor:
        """Compute Nesterov momentum in float32, sharded like the weight."""
        momentum = self.state["momentum"]
        gradient: Any = self.weight.grad.float()  # type: ignore[union-attr]
        momentum.mul_(MOMENTUM).add_(gradient * (1 - MOMENTUM))
        return gradient * (1 - MOMENTUM) + momentum * MOMENTUM

    def apply(self, direction: Tensor) -> None:
        """Update the weight. direction: this process's rows of the orthogonalized update."""
        rate, decay = float(self.group["lr"]), self.group["weight_decay"]
        size = ADAMW_SIZE * max(self.weight.shape[-2:]) ** 0.5
        own = local_part(self.weight)
        new = own.float().mul(1 - rate * decay).sub_(direction.float(), alpha=rate * size)
        if own.dtype == torch.bfloat16:
            start = first_row(self.weight) * self.weight.shape[1:].numel()
            key = rounding_key(self.group["seed"], self.number, int(self.state["step"]))
            new = rounded(new.view(-1), start, key).view(new.shape)
        own.copy_(new)


class Muon(CompactAdamW):
    """Muon for parameter groups with `matrices: True`, and AdamW for the others.

    products: the dtype in which matrices are orthogonalized. Processes divide the matrices among
    themselves, so every process must call `step`. Weights can be float32 or bfloat16.
    """

    def __init__(self, params: Any, *, products: torch.dtype, **options: Any) -> None:
        super().__init__(params, **options)
        self.products = products

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        whole = []
        for matrix in self._matrices():
            if matrix.weight.dim() > 2 and isinstance(matrix.weight, DTensor):
                # Each process has complete matrices of the stack.
                matrix.apply(orthogonalized(local_part(matrix.update()).to(self.products)))
            else:
                whole.append(matrix)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        for begin in range(0, len(whole), processes):
            self._step_together(whole[begin : begin + processes])
        return loss

    def _matrices(self) -> Iterator[_Matrix]:
        for number, group, weight in self.numbered(matrices=True):
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["momentum"] = torch.zeros_like(
                    weight, dtype=torch.float32, memory_format=torch.contiguous_format
                )
            state["step"] += 1
            yield _Matrix(weight, group, state, number)

    def _step_together(self, matrices: Sequence[_Matrix]) -> None:
        """Step at most one matrix per process, which orthogonalizes it for all processes."""
        rank, own = dist.get_rank() if dist.is_initialized() else 0, None
        for owner, matrix in enumerate(matrices):
            update = matrix.update().to(self.products)
            complete = update.full_tensor() if isinstance(update, DTensor) else update
            if owner == rank:
                own = orthogonalized(complete).contiguous()
        for owner, matrix in enumerate(matrices):
            weight = matrix.weight
            direction = own if owner == rank else None
            if direction is None:
                direction = torch.empty(weight.shape, dtype=self.products, device=weight.device)
            if dist.is_initialized():
                dist.broadcast(direction, src=owner)
            start = first_row(weight)
            matrix.apply(direction[start : start + len(local_part(weight))])


def orthogonalized(matrix: Tensor) -> Tensor:
    """Approximate the nearest matrix with orthonormal rows, or with orthonormal columns if there
    are more rows than columns.

    This runs Newton-Schulz iterations in the matrix's dtype, for each matrix of a stack.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    # Use the same layout regardless of the gradient's, since rounding would depend on it.
    wide = (matrix.mT if tall else matrix).contiguous()
    length = torch.linalg.matrix_norm(wide, dtype=torch.float32, keepdim=True)
    wide = wide / length.clamp(min=1e-7).to(wide.dtype)
    for _ in range(ITERATIONS):
        square_MM = wide @ wide.mT
        wide = a * wide + (b * square_MM + c * (square_MM @ square_MM)) @ wide
    return wide.mT if tall else wide


def muon_for(module: Distillation, **options: Any) -> Muon:
    """Create the optimizer for a module's trainable parameters.

    Muon steps the matrices of the student's layers. AdamW steps embeddings, the head, vectors,
    convolutions, and parameters outside of the student. options: for `Muon`.
    """
    matrices = {
        id(weight)
        for part in module.student.base_model.modules()
        if not isinstance(part, nn.Embedding | nn.Conv1d)
        for weight in part.parameters(recurse=False)
        if weight.dim() > 1
    }
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    layers = [each for each in trained if id(each) in matrices]
    others = [each for each in trained if id(each) not in matrices and each.dim() > 1]
    vectors = [each for each in trained if each.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": layers, "matrices": True},
        {"params": others},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return Muon([group for group in groups if group["params"]], **options)


def chosen_optimizer(
    settings: TrainRecipe, products: torch.dtype, seed: int
) -> tuple[Any, dict[str, Any]] | None:
    """Return Trainer's `optimizer_cls_and_kwargs`; None for PyTorch's AdamW.

    The first is an optimizer class, or a function that returns a function of the model. products:
    dtype of matrix products.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "seed": seed,
    }
    if settings.optimizer == "muon":
        options |= {"products": products, "weight_decay": settings.weight_decay}
        return (lambda: muon_for), options
    bits = 8 if settings.optimizer == "adamw_8bit" else 32
    if bits == 32 and settings.weights == "float32":
        return None
    return CompactAdamW, {**options, "bits": bits}
