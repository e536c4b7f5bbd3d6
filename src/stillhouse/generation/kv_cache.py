"""A KV cache whose rows are slots, each with a sequence of a different length.

In transformers' caches, every row has the same length. Here a slot gets a new sequence as soon as
its old one has ended, and a mask restricts attention to the slot's own tokens.

Shapes: B slots in use, C all slots, T token positions, H key-value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

GROWTH = 128
"""The cache grows in multiples of this number of token positions."""


@dataclass
class _Slots:
    """State shared by the layers: their sizes, and the state of the current pass.

    It has no reference to the layers, because a reference cycle would keep keys and values in
    memory until Python's garbage collector runs.
    """

    capacity: int
    places: int = 0
    longest: int = 0
    filling: tuple[int, int] | None = None
    at_B: Tensor = field(init=False)
    rows_B: Tensor = field(init=False)


class _SlotLayer(CacheLayerMixin):
    """The keys and values of one layer."""

    is_sliding = False

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, like_BHLD: Tensor) -> Tensor:
        _, heads, _, width = like_BHLD.shape
        return like_BHLD.new_zeros(self.slots.capacity, heads, self.slots.places, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.slots
        if slots.filling is not None:
            first, last = slots.filling
            length = key_states.shape[2]
            self.keys[first:last, :, :length] = key_states
            self.values[first:last, :, :length] = value_states
            return key_states, value_states
        used, longest = len(slots.at_B), slots.longest
        self.keys[slots.rows_B, :, slots.at_B] = key_states[:, :, 0]
        self.values[slots.rows_B, :, slots.at_B] = value_states[:, :, 0]
        return self.keys[:used, :, :longest], self.values[:used, :, :longest]

    def grow(self, places: int) -> None:
        if self.is_initialized:
            more = (0, 0, 0, places - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, more)
            self.values = torch.nn.functional.pad(self.values, more)

    def move(self, source: int, target: int, length: int) -> None:
        for states in (self.keys, self.values):
            states[target, :, :length] = states[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        """The length before the current pass; used only to fill slots, when it is 0."""
        return 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A cache of `capacity` slots, of which 0 to B-1 are in use.

    Call `fill` or `step` before each pass of the model.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.slots = _Slots(capacity)
        super().__init__(layers=[_SlotLayer(self.slots) for _ in range(layers)])

    def reserve(self, places: int) -> None:
        """Make room for sequences of this many tokens."""
        if places > self.slots.places:
            self.slots.places = -(-places // GROWTH) * GROWTH
            for layer in self.layers:
                layer.grow(self.slots.places)

    def fill(self, first: int, last: int) -> None:
        """Prepare a pass that reads prompts from position 0 into slots first to last - 1.

        Prompts may be padded on the right: no token attends to padding, and answers overwrite it.
        """
        self.slots.filling = (first, last)

    def step(self, lengths_B: Tensor) -> Tensor:
        """Prepare a pass that adds one token to each slot in use, after its `lengths_B` tokens.

        Returns the attention mask [B, 1, 1, T]: True where a slot has a token.
        """
        slots = self.slots
        slots.filling = None
        slots.at_B = lengths_B
        slots.rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        slots.longest = int(lengths_B.max()) + 1
        places_T = torch.arange(slots.longest, device=lengths_B.device)
        return (places_T <= lengths_B[:, None])[:, None, None]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot's first `length` tokens to a different slot."""
        for layer in self.layers:
            layer.move(source, target, length)


def caches_of(output: Any) -> dict[str, Any]:
    """The cache in a model's output, as keyword arguments of the next pass; empty if there is none.

    Most models return keys and values; Mamba and RWKV return a state under a different name.
    """
    names = ("past_key_values", "cache_params", "state")
    found = {name: getattr(output, name, None) for name in names}
    return {name: cache for name, cache in found.items() if cache is not None}


def fits_slots(model: Any) -> bool:
    """Whether every layer attends to all tokens before it: no window, no recurrent state."""
    config = model.config
    if getattr(config, "alibi", False):  # Falcon computes its biases from a 2D mask
        return False
    return config._attn_implementation == "sdpa" and _layers_are(model, DynamicLayer)


def fits_padding(model: Any) -> bool:
    """Whether rows of a batch may be padded on the left: layers use full or sliding-window
    attention. A recurrent state or chunked attention would not ignore the padding."""
    config = model.config.get_text_config()
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return not chunked and _layers_are(model, DynamicLayer, DynamicSlidingWindowLayer)


def _layers_are(model: Any, *kinds: type) -> bool:
    stateful = getattr(model, "_is_stateful", False)
    return not stateful and all(
        type(layer) in kinds for layer in DynamicCache(config=model.config).layers
    )
