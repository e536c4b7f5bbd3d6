"""Packed documents in models that do not separate them.

Most transformers models mask documents from each other where `position_ids` restart. A recurrent
layer or a convolution still carries its state across that boundary, and some models (OPT, GPT-OSS)
build their mask without the positions. For such models, each document is run as a separate row.

Shapes: R windows, L tokens, S documents, N their tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, masking_utils
from transformers.cache_utils import DynamicLayer

from stillhouse.data.batches import document_bounds
from stillhouse.teachers.quiet import quiet

_separating: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_masking: dict[type, bool] = {}


def separates_documents(model: Any) -> bool:
    """Whether the model itself separates documents where positions restart in a window."""
    if model not in _separating:
        _separating[model] = not _carries_state(model) and _masks_documents(model)
    return _separating[model]


def _carries_state(model: Any) -> bool:
    """Whether a layer passes a state from token to token, regardless of the mask."""
    layers = DynamicCache(config=model.config).layers
    stateful = getattr(model, "_is_stateful", False)
    return stateful or not all(isinstance(layer, DynamicLayer) for layer in layers)


class _MaskedError(Exception):
    """Signals that the model passed its positions to the function that finds documents for a
    mask."""


def _masks_documents(model: Any) -> bool:
    """Whether the model builds its mask from the positions: a small model of the same class,
    without weights, is run until it does."""
    kind = type(model)
    if kind not in _masking:
        _masking[kind] = False
        try:
            with (
                unset_fake_temporarily(),
                quiet(),
                _masks_raise(),
                torch.device("meta"),
                torch.no_grad(),
            ):
                small = kind(small_config(model.config))
                ids_RL = torch.zeros(1, 4, dtype=torch.long)
                small.base_model(input_ids=ids_RL, position_ids=ids_RL, use_cache=False)
        except _MaskedError:
            _masking[kind] = True
        # Without weights, or with arguments that its code does not accept, a model can raise
        # anything.
        except Exception:
            pass
    return _masking[kind]


@contextmanager
def _masks_raise() -> Iterator[None]:
    """Raise `_MaskedError` when a mask is built from positions inside the block."""

    def find(*_: Any) -> None:
        raise _MaskedError

    known = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = find
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = known


def small_config(config: Any) -> Any:
    """A copy of a configuration with one layer, a small vocabulary, and no special tokens."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.vocab_size, text.num_hidden_layers = 64, 1
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return small


def run_documents(
    model: Any, run: Callable[[Tensor], list[Tensor]], input_ids_RL: Tensor, position_ids_RL: Tensor
) -> list[Tensor]:
    """Apply `run` to each document as a separate row, and put the outputs back in their places.

    run: (token ids [S, L] with padding on the right) → tensors [S, L, ...]. Returns them as
    [R, L, ...], with zeros for documents of one token, which predict nothing.
    """
    ids_N, device = input_ids_RL.flatten(), input_ids_RL.device
    places, outputs = [], list[list[Tensor]]()
    for spans in _batches(document_bounds(position_ids_RL).tolist(), sharded=_is_sharded(model)):
        start_S, stop_S = torch.tensor(spans, device=device).unbind(1)
        longest = max(stop - start for start, stop in spans)
        place_SL = start_S[:, None] + torch.arange(longest, device=device)
        own_SL = place_SL < stop_S[:, None]
        places.append(place_SL[own_SL])
        found = run(ids_N[place_SL.clamp(max=stop_S[:, None] - 1)])
        outputs.append([each_SLX[own_SL] for each_SLX in found])
    place_N = torch.cat(places)
    return [
        torch.zeros(len(ids_N), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
        .index_copy(0, place_N, torch.cat(parts))
        .unflatten(0, input_ids_RL.shape)
        for parts in zip(*outputs, strict=True)
    ]


def _batches(bounds: list[int], *, sharded: bool) -> Iterator[list[tuple[int, int]]]:
    """Batches of documents (first token, one after the last) whose lengths differ by at most a
    factor of two. A sharded model gets a single batch, since all processes must run it equally
    often."""
    spans = [(start, stop) for start, stop in pairwise(bounds) if stop - start > 1] or [(0, 1)]
    if sharded:
        yield spans
        return

    def size(span: tuple[int, int]) -> int:
        return (span[1] - span[0] - 1).bit_length()

    for _, batch in groupby(sorted(spans, key=size), size):
        yield list(batch)


def _is_sharded(model: Any) -> bool:
    return any(isinstance(weight, DTensor) for weight in model.parameters())
