"""With DDP and FSDP2, two processes have the gradients of one, even if one has no rows."""

from __future__ import annotations

import gc
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stillhouse.errors import SignalError
from stillhouse.objectives.fused import fused_loss
from stillhouse.objectives.terms import Term
from stillhouse.signals.signal_types import DenseSignal, LMHead
from tests.forks import two_ranks
from tests.objectives.cases import grad_of

pytestmark = pytest.mark.run

ROWS, VOCAB, WIDTH = 9, 12, 8
TERMS = [Term("jsd"), Term("cross_entropy", 0.5)]


class Student(nn.Module):
    """An embedding, a layer, and a head tied to the embedding; `forward` returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(
        self, ids_N: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, scale: float
    ) -> Tensor:
        hidden_ND = self.layer(self.embedding(ids_N))
        return fused_loss(
            hidden_ND,
            LMHead(self.head.weight),
            TERMS,
            signal=DenseSignal(teacher_ND, LMHead(teacher_VD)),
            targets_N=ids_N,
            scale=scale,
        ).total


def problem() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, VOCAB, (ROWS,), generator=g),
        torch.randn(ROWS, 5, generator=g),
        torch.randn(VOCAB, 5, generator=g),
    )


def gradients_of_one_process() -> dict[str, Tensor]:
    student = Student()
    ids_N, teacher_ND, teacher_VD = problem()
    student(ids_N, teacher_ND, teacher_VD, 1 / ROWS).backward()
    return {name: grad_of(p) for name, p in student.named_parameters()}


def work(folder: Path, wrap: str, cut: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    torch.set_num_threads(1)
    student = Student()
    wrapped: Any  # FSDPModule is not typed as a module
    if wrap == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(student)
    else:
        wrapped = fully_shard(student)
        with pytest.raises(SignalError, match=r"head.weight_VD is sharded"):
            fused_loss(torch.zeros(1, WIDTH), LMHead(student.head.weight), TERMS[1:])
    ids_N, teacher_ND, teacher_VD = problem()
    rows = slice(0, cut) if rank == 0 else slice(cut, ROWS)
    # Both wrappers average gradients over ranks; the loss is a sum divided by the global count.
    wrapped(ids_N[rows], teacher_ND[rows], teacher_VD, 2 / ROWS).backward()
    grads = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in student.named_parameters()
    }
    if rank == 0:
        torch.save(grads, folder / "grads.pt")
    dist.barrier()  # a rank that exits early may abort the other's communication
    # The wrapper refers to the group. If it were freed after the group, gloo's threads and Python's
    # lock would wait for each other forever.
    del wrapped, student, grads
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.parametrize("cut", [4, 0])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(wrap: str, cut: int, tmp_path: Path) -> None:
    for rank in two_ranks(work, tmp_path, wrap, cut):
        assert rank.wait(timeout=300) == 0, rank.communicate()[1]
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    expected = gradients_of_one_process()
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
