"""A teacher whose weights are sharded over the processes of a torchrun (FSDP2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from stillhouse.data.batches import Batch
from stillhouse.errors import ModelError
from stillhouse.hardware import default_device
from stillhouse.launch import world_size
from stillhouse.processes import open_group
from stillhouse.signals import LMHead
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.load_model import load_config, load_model, load_tokenizer
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.packed_attention import use_attention
from stillhouse.teachers.planned_model import check_planned_head
from stillhouse.teachers.teacher import OUTPUT_ONLY, TeacherView

T = TypeVar("T")


class ShardedTeacher(LocalTeacher):
    """As a local teacher, of which each process holds a part; all must call `answer` together.

    Layers are gathered one after the other, and the head is kept. model: its forward is replaced,
    since FSDP2 gathers weights only around the forward of the root module.
    """

    collective = True
    tokens_together = 16384

    def __init__(self, model: Any, tokenizer: Any = None, **more: Any) -> None:
        super().__init__(model, tokenizer, **more)
        model.forward = _call

    @property
    def head(self) -> LMHead:
        model = self.model
        kept = model.get_output_embeddings()
        if not isinstance(kept, FSDPModule):  # tied: FSDP2 has the weight of the embeddings alone
            kept = model.get_input_embeddings()
        kept.unshard()
        return replace(lm_head(model), weight_VD=kept.weight)

    @torch.no_grad()
    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        return self.gathered(lambda head: super(ShardedTeacher, self).answer(batch, request))

    def gathered(self, work: Callable[[LMHead], T]) -> T:
        """Run work that uses the model's backbone; its argument is the head. Every process must
        call this, and run the backbone equally often."""
        found: T = self.model(lambda: work(self.head))
        return found

    def place(self, device: torch.device, context: int) -> None:
        """Its parts are where they belong; only attention is chosen."""
        use_attention(self.model, context, device, self.model.dtype)


def _call(work: Callable[[], T]) -> T:
    return work()


def load_sharded_teacher(
    source: ModelSource, *, dtype: torch.dtype, shards: int, offload: bool = False
) -> ShardedTeacher:
    """The model of a folder as a teacher, of which each process reads its own part.

    shards: over how many processes; groups of so many have a copy each. offload: keep the weights
    on the host, and only what is gathered on the GPU; without a GPU it changes nothing.
    Raises ModelError as `load_model`.
    """
    open_group()
    offload = offload and default_device().type != "cpu"
    require_plan(load_config(source), source.path)
    over = DistributedConfig(
        fsdp_size=shards, dp_replicate_size=world_size() // shards, fsdp_cpu_offload=offload
    )
    model = load_model(source, dtype=dtype, distributed=over)
    if offload:
        _to_host(model)
    return ShardedTeacher(model, load_tokenizer(source), source=source)


def _to_host(model: Any) -> None:
    """Move the shards to the host, where FSDP2 expects what it offloads; transformers loads them to
    the device. Buffers stay."""
    model._apply(lambda each: each.cpu() if isinstance(each, DTensor) else each)


def require_plan(config: Any, where: object) -> None:
    """Raise ModelError if transformers cannot shard the model, or its head cannot be checked.

    where: what the error names.
    """
    try:
        small = check_planned_head(config)
    except RuntimeError:  # its forward reads values, which do not exist without weights
        small = None
    else:
        modules = {re.sub(r"\.\d+", ".*", name) for name, _ in small.named_modules()}
        if any("*" in name for name in modules.intersection(small.fsdp_plan)):
            return
    raise ModelError(
        f"transformers has no plan to shard {type(small).__name__ if small else config.model_type}",
        where=where,
        fix="use train.shard: student or none, or store the teacher's answers with `signals: {}`",
    )
