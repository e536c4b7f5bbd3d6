"""Generation of rollouts with the student, in the middle of its training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stillhouse.generation.generator import Continuation, Generator, TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.packed_linear import packed_linear
from stillhouse.generation.rollout_config import VllmRollouts, VllmServerRollouts
from stillhouse.generation.vllm_rollouts import OpenGenerator, server_rollouts, vllm_rollouts
from stillhouse.hardware import return_gaps
from stillhouse.launch import process_index
from stillhouse.teachers.attention_checks import FLEX
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.packed_attention import NAME as PACKED_ATTENTION
from stillhouse.teachers.short_attention import NAME as SHORT_ATTENTION
from stillhouse.training.rollouts import Rollout
from stillhouse.training.step_rows import Slot
from stillhouse.training.train_config import OnPolicyRecipe

_OF_WINDOWS = (SHORT_ATTENTION, PACKED_ATTENTION, FLEX)
"""Attention implementations for training windows. Generation uses PyTorch's SDPA instead."""


@contextmanager
def able_to_generate(model: Any) -> Iterator[None]:
    """Inside the block, put the model in eval mode with attention that can use a KV cache.
    Everything is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    model.eval()
    if attention in _OF_WINDOWS:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if attention in _OF_WINDOWS:
            model.set_attn_implementation(attention)
        for module in training:
            module.training = True


@contextmanager
def narrowed(
    model: Any, dtype: torch.dtype, *, besides: frozenset[Tensor] = frozenset()
) -> Iterator[None]:
    """Inside the block, convert the parameters to the narrower dtype of training's matrix products.

    Generation reads all weights for each token, so its time is proportional to their size. The copy
    is smaller than the gradients, which do not exist between two steps. besides: parameters that
    are left unchanged.
    """
    narrow = [parameter for parameter in model.parameters() if parameter not in besides]
    wide = [(parameter, parameter.data) for parameter in narrow]
    try:
        for parameter, data in wide:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in wide:
            parameter.data = data


@contextmanager
def local_generator(
    batch: int, dtype: torch.dtype, model: Any, ends: frozenset[int]
) -> Iterator[Generator]:
    """Generate in this process, with the weights that are trained. dtype: of matrix products."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    with ExitStack() as ready:
        # Gradients and activations leave gaps in memory into which a KV cache does not fit, and
        # vice versa.
        return_gaps()
        ready.callback(return_gaps)
        ready.enter_context(able_to_generate(model))
        narrow = dtype != torch.float32
        if narrow and sharded:  # FSDP2 owns the tensors of gathered weights
            ready.enter_context(torch.autocast(model.device.type, dtype))
        elif not sharded:
            # The generator would copy the narrow weights once more, so pack them here.
            packed = ready.enter_context(packed_linear(model, dtype if narrow else None))
            if narrow:
                ready.enter_context(narrowed(model, dtype, besides=packed))
        yield LocalGenerator(model, ends, batch=batch, pack=not sharded)


@contextmanager
def rollout_generator(
    section: OnPolicyRecipe | None, dtype: torch.dtype, place: ModelSource, *, base: Path, seed: int
) -> Iterator[OpenGenerator]:
    """Open the generator of the student's rollouts for the duration of a training run.

    dtype: of the student's matrix products. place: a folder for checkpoints that are handed over to
    an engine. base: the folder that paths in the section are relative to. Raises as `vllm_rollouts`
    and `server_rollouts` do.
    """
    own = None if section is None else section.generator
    if isinstance(own, VllmRollouts):
        weights = place.derived(place.path / f"weights-{process_index()}")
        with vllm_rollouts(own, weights, base=base, seed=seed) as opened:
            yield partial(as_trained, opened, dtype)
    elif isinstance(own, VllmServerRollouts):
        with server_rollouts(own, base=base) as opened:
            yield partial(as_trained, opened, dtype)
    else:
        yield partial(local_generator, 32 if section is None else section.batch, dtype)


@contextmanager
def as_trained(
    engine: OpenGenerator, dtype: torch.dtype, model: Any, ends: frozenset[int]
) -> Iterator[Generator]:
    """Give an engine the weights of a model in training, in the dtype of its matrix products."""
    with able_to_generate(model), narrowed(model, dtype), engine(model, ends) as generator:
        yield generator


def slot_seed(seed: int, slot: int, ids: Sequence[int]) -> int:
    """The seed for sampling a rollout, derived from the run's seed, its slot, and its prompt."""
    text = f"{seed} {slot} {','.join(map(str, ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def slot_request(
    slot: Slot,
    prompt: Sequence[int],
    section: OnPolicyRecipe,
    seed: int,
    *,
    given: Sequence[int] = (),
    most: int | None = None,
) -> TokenPrompt:
    """The request for a slot's answer.

    given: tokens at the beginning of the answer. most: maximum number of tokens, if it is less than
    the slot's room.
    """
    room = slot.room - len(given)
    return TokenPrompt(
        [*prompt, *given],
        room if most is None else min(most, room),
        temperature=section.temperature,
        top_p=section.top_p,
        seed=slot_seed(seed, slot.number, prompt),
    )


def write_answers(
    generator: Generator,
    slots: Sequence[Slot],
    prompts: Sequence[Sequence[int]],
    section: OnPolicyRecipe,
    seed: int,
    *,
    begun: Sequence[Continuation] = (),
) -> list[Rollout]:
    """Generate the answers to the slots' prompts.

    begun: the beginning of each answer, if a different model generated it. Answers that have
    already ended are left out.
    """
    begun = begun or [Continuation((), "length")] * len(slots)
    asked = [
        (slot, prompt, slot_request(slot, prompt, section, seed, given=start.ids))
        for slot, prompt, start in zip(slots, prompts, begun, strict=True)
        if start.stop == "length" and len(start.ids) < slot.room
    ]
    written = dict(generator.generate(request for _, _, request in asked))
    return [
        Rollout(
            slot=slot.number,
            ids=(*request.ids, *written[number].ids),
            prompt=len(prompt),
            given=len(request.ids),
            stop=written[number].stop,
        )
        for number, (slot, prompt, request) in enumerate(asked)
    ]
