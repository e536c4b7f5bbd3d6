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
    """A local teacher of which each process has a shard. All must call `answer` together.

    Layers are gathered one after another, and the gathered head is kept. model: its forward is
    replaced, since FSDP2 gathers weights only around the root module's forward.
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
        if not isinstance(kept, FSDPModule):  # tied: FSDP2 manages the weight with the embeddings
            kept = model.get_input_embeddings()
        kept.unshard()
        return replace(lm_head(model), weight_VD=kept.weight)

    @torch.no_grad()
    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        return self.gathered(lambda head: super(ShardedTeacher, self).answer(batch, request))

    def gathered(self, work: Callable[[LMHead], T]) -> T:
        """Call `work(head)`, which can use the model's backbone. Every process must call this, and
        run the backbone equally often."""
        found: T = self.model(lambda: work(self.head))
        return found

    def place(self, device: torch.device, context: int) -> None:
        """Choose the attention. The shards already are where they belong."""
        use_attention(self.model, context, device, self.model.dtype)


def _call(work: Callable[[], T]) -> T:
    return work()


def load_sharded_teacher(
    source: ModelSource, *, dtype: torch.dtype, shards: int, offload: bool = False
) -> ShardedTeacher:
    """Load a model folder as a sharded teacher, of which each process reads its own shard.

    shards: number of processes that share a copy of the model. offload: keep the shards in host
    memory, and only gathered weights on the GPU; without a GPU, this has no effect.
    Raises ModelError as `load_model` does.
    """
    open_group()
    offload = offload and default_device().type != "cpu"
    require_plan(load_config(source), source.path)
    over = DistributedConfig(
        fsdp_size=shards, dp_replicate_size=world_size() // shards, fsdp_cpu_offload=offload
    )
    model = load_model(source, dtype=dtype, distributed=over)
    if offload:
        # FSDP2 expects offloaded weights on the host; transformers loads them to the device.
        # Buffers stay there.
        model._apply(lambda each: each.cpu() if isinstance(each, DTensor) else each)
    return ShardedTeacher(model, load_tokenizer(source), source=source)


def require_plan(config: Any, where: object) -> None:
    """Raise ModelError if transformers cannot shard the model, or its head cannot be checked.

    where: for the error message.
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
