"""The processes of a torchrun: their process group, and models that are sharded over it."""

from __future__ import annotations

import atexit
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stillhouse.errors import DeviceError, LostProcessError, RecipeError, StillhouseError
from stillhouse.hardware import default_device, device_kind
from stillhouse.launch import processes_here, world_size
from stillhouse.process_watch import AGAIN, NOTICE_SECONDS, lost_process_found

T = TypeVar("T")

_LOST = re.compile("gloo|Connection (reset|closed) by peer|ProcessGroup|NCCL", re.IGNORECASE)
"""Matches errors from gloo, which are plain RuntimeErrors."""


PATIENCE = timedelta(days=30)
"""The timeout of processes that wait while another works; a killed process is noticed at once."""


def open_group() -> None:
    """Open a torchrun's process group unless it is open. Every process must call this.

    Raises DeviceError in every process if their devices differ.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo as well as NCCL, because checkpointing exchanges plans between CPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(leave_group)
    _require_equal_devices(device_kind(device))


_node_sizes: set[int] = set()
"""The different numbers of processes per node, once the group is open."""


def _require_equal_devices(own: str) -> None:
    """Raise DeviceError unless all devices are alike: each process chooses precision, kernels, and
    batch sizes for itself."""
    found: list[tuple[str, int]] = [("", 0)] * world_size()
    dist.all_gather_object(found, (own, processes_here()))
    kinds = [kind for kind, _ in found]
    _node_sizes.update(here for _, here in found)
    other = next((number for number, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise DeviceError(
            f"process 0 has {kinds[0]}, and process {other} has {kinds[other]}",
            where="the processes of this torchrun",
            fix="use the same kind of device in all processes: select GPUs with "
            "CUDA_VISIBLE_DEVICES, or use different nodes",
        )


def leave_group() -> None:
    """Close the group if it is open: gloo's threads can abort a process that exits without this."""
    gc.collect()  # a trainer is part of a reference cycle, and its DDP wrapper must go first
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def patient_group() -> Any:
    """Return a CPU group of all processes in which waiting practically never times out.

    Every process must call this. Other groups time out after half an hour at most.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if dist.is_initialized():
        dist.barrier(group=patient_group())


def sum_over_processes(own: Tensor) -> Tensor:
    """Sum a CPU tensor over all processes, in place; with one process, return `own` unchanged."""
    if dist.is_initialized():
        dist.all_reduce(own)
    return own


@contextmanager
def lost_process(processes: int) -> Iterator[None]:
    """Raise LostProcessError if another process has ended and this one therefore cannot
    continue."""
    try:
        yield
    except StillhouseError:
        raise
    except RuntimeError as error:
        if processes == 1 or not (isinstance(error, DistError) or _LOST.search(str(error))):
            raise
        raise lost_process_found(NOTICE_SECONDS) or LostProcessError(
            f"another of the {processes} processes has ended or cannot be reached",
            where=str(error).splitlines()[0],
            fix=f"see its own message (if there is none, it was killed), and {AGAIN}",
        ) from error


def shards_in_node(within_node: bool) -> int:
    """Return the number of processes to shard a model over: those of a node, or all.

    Raises RecipeError if the nodes have different numbers of processes.
    """
    processes, (here, *others) = world_size(), sorted(_node_sizes or {processes_here()})
    if not within_node or here == processes:
        return processes
    if others:
        sizes = " and ".join(f"{size:,}" for size in (here, *others))
        raise RecipeError(
            f"nodes have different numbers of processes ({sizes}), so a model cannot be sharded "
            "within each node",
            where="train.shard_within",
            fix="start the same number of processes on every node, or use shard_within: all",
        )
    return here


def sharding_mesh(shards: int) -> DeviceMesh:
    """Create a mesh of shape [replicas, shards], or [shards] if every process has its own shard."""
    open_group()
    device, processes = default_device().type, world_size()
    if shards == processes:
        return init_device_mesh(device, (processes,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device, (processes // shards, shards), mesh_dim_names=names)


def shard(root: nn.Module, model: Any, mesh: DeviceMesh) -> None:
    """Shard a module in place with FSDP2: each block of `model` is a unit, and so is the rest.

    root: the module whose forward is called: `model` or a module around it.
    Gradients are reduced in float32 and averaged over all processes.
    Raises RecipeError like `require_blocks`.
    """
    blocks = require_blocks(model)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def require_blocks(model: Any) -> list[nn.Module]:
    """Return a model's decoder blocks. Raises RecipeError if they are not known."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise RecipeError(
            f"{type(model).__name__} does not name its decoder blocks, so it cannot be sharded",
            where="train.shard",
            fix="use train.shard: none",
        )
    return blocks


def release_gathered(root: nn.Module) -> None:
    """Free weights that a forward pass without a backward pass left gathered, because they would
    become stale."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def with_gathered(root: nn.Module, work: Callable[[], T]) -> T:
    """Run `work` while every process has all the weights of a sharded module. Every process must
    call this, but each can pass different work.

    root: the module whose forward makes FSDP2 gather; its forward is replaced during the call.
    """
    blocks = [one for one in root.modules() if isinstance(one, FSDPModule) and one is not root]

    def inside(run: Callable[[], T]) -> T:
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        return run()

    root.forward = inside
    try:
        with torch.no_grad():
            found: T = root(work)
    finally:
        del root.forward
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        release_gathered(root)
    return found


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Return the row of the full tensor at which this process's part starts."""
    if not isinstance(tensor, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return int(offset[0])


def part_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Return this process's part of a full tensor that is divided by rows the way `sharded` is."""
    if not isinstance(sharded, DTensor):
        return tensor
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements).to_local()
