"""Run calibration windows through a model, one layer at a time.

The residual stream and all statistics are float32; products can be bfloat16 (see `products`).

Shapes: R windows of a batch, L tokens, N rows of all batches, D hidden width, F FFN width, A
attention width (heads × head_dim).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.draw_windows import ChosenWindows, drawn_order
from stillhouse.data.shift import text_end
from stillhouse.data.windows import WindowSet
from stillhouse.errors import DataError
from stillhouse.pruning.axes import Axes
from stillhouse.shared_work import ALONE, Empty, Processes
from stillhouse.teachers.activations import decoder_layers

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once: enough for fast products, few enough for memory."""


@dataclass(frozen=True)
class Batch:
    """A batch of windows. counted_RL is False on the padding at the end of a window."""

    input_ids_RL: Tensor
    position_ids_RL: Tensor
    counted_RL: Tensor


class OwnBatches(list[Batch]):
    """This process's share of `total` batches."""

    def __init__(self, own: Iterable[Batch], total: int, processes: Processes = ALONE) -> None:
        super().__init__(own)
        self.total = total
        self.processes = processes

    @property
    def numbers(self) -> range:
        """These batches' indices among all batches."""
        return self.processes.part(self.total)

    def sum(self, terms: Iterable[Sequence[Tensor]], empty: Empty) -> list[Tensor]:
        """Sum one term per batch over the batches of all processes; see `Processes.sum`."""
        return self.processes.sum(terms, self.total, empty)

    def sum_pairs(self, terms: Iterable[tuple[float, float]]) -> tuple[float, float]:
        """Same as `sum`, for two numbers per batch."""
        tensors = ([torch.tensor(term, dtype=torch.float64)] for term in terms)
        (total,) = self.sum(tensors, lambda: [torch.zeros(2, dtype=torch.float64)])
        return total[0].item(), total[1].item()

    def tokens(self) -> tuple[int, int]:
        """The number of tokens in all batches, and how many of them are counted."""
        own = [(one.counted_RL.numel(), int(one.counted_RL.sum())) for one in self]
        every, counted = self.sum_pairs(own)
        return int(every), int(counted)


@dataclass(frozen=True)
class LayerInputs:
    """What the model passes to its layers for one batch: embedded tokens, and each layer's keyword
    arguments (`extras`)."""

    hidden_RLD: Tensor
    extras: list[dict[str, Any]]


def calibration_batches(
    windows: WindowSet,
    tokens: int,
    seed: int,
    device: torch.device | str = "cpu",
    together: int = BATCH_TOKENS,
    processes: Processes = ALONE,
) -> OwnBatches:
    """Draw windows with about `tokens` tokens in total, or all windows if there are fewer.

    seed: determines which windows are drawn.
    together: approximate number of tokens per batch.
    processes: share the batches among themselves.

    Raises DataError if there are no windows.
    """
    if len(windows) == 0:
        raise DataError(
            "there is no training text to calibrate on",
            where="data",
            fix="add sources, or lower heldout_tokens",
        )
    length = len(windows[0]["input_ids"])
    chosen = sorted(_order(windows, seed)[: -(-tokens // length)])
    at_once = max(1, together // length)
    starts = range(0, len(chosen), at_once)
    own = [
        _batch([windows[index] for index in chosen[start : start + at_once]], device)
        for start in (starts[number] for number in processes.part(len(starts)))
    ]
    return OwnBatches(own, len(starts), processes)


def unseen(windows: WindowSet, tokens: int, seed: int) -> ChosenWindows:
    """The windows that `calibration_batches` with these arguments does not draw."""
    length = len(windows[0]["input_ids"])
    return ChosenWindows(windows, _order(windows, seed)[-(-tokens // length) :])


def _order(windows: WindowSet, seed: int) -> list[int]:
    return drawn_order(windows, f"calibration {seed}")


def _batch(rows: Sequence[dict[str, Tensor]], device: torch.device | str) -> Batch:
    ids_RL = torch.stack([row["input_ids"] for row in rows])
    ends_R1 = torch.tensor([[text_end(row["labels"])] for row in rows])
    return Batch(
        ids_RL.to(device),
        torch.stack([row["position_ids"] for row in rows]).to(device),
        (torch.arange(ids_RL.shape[1]) < ends_R1).to(device),
    )


def products(model: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Within the context, compute matrix products in `dtype` and sums in float32."""
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def layer_inputs(model: Any, batch: Batch) -> LayerInputs:
    """Embed a batch and record every layer's arguments (masks, RoPE), without running any layer."""
    extras: list[dict[str, Any]] = []
    entered: list[Tensor] = []

    def note_call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "layers are called with keyword arguments"
        entered.append(hidden_states)
        extras.append(kwargs)
        return hidden_states

    with _forward_replaced(decoder_layers(model), note_call):
        model.base_model(
            input_ids=batch.input_ids_RL, position_ids=batch.position_ids_RL, use_cache=False
        )
    return LayerInputs(entered[0], extras)


def run_layer(layer: nn.Module, hidden_RLD: Tensor, extras: dict[str, Any]) -> Tensor:
    output = layer(hidden_RLD, **extras)
    return output[0] if isinstance(output, tuple) else output


def after_attention(layer: Any, axes: Axes, hidden_RLD: Tensor, extras: dict[str, Any]) -> Tensor:
    """The residual stream between a layer's attention and its FFN; the FFN is not run."""
    norms = [
        getattr(layer, n) for n in (axes.ffn_input_norm, axes.ffn_output_norm) if n is not None
    ]
    with (
        _forward_replaced([layer.mlp], lambda x: torch.zeros_like(x)),
        _forward_replaced(norms, lambda x: x),
    ):
        return run_layer(layer, hidden_RLD, extras)


def ffn_activations(layer: Any, axes: Axes, mid_RLD: Tensor) -> Tensor:
    """The down projection's input, act(gate(x)) · up(x) with x = norm(mid), [R, L, F]."""
    x_RLD = getattr(layer, axes.ffn_input_norm)(mid_RLD)
    gated: Tensor = layer.mlp.act_fn(layer.mlp.gate_proj(x_RLD))
    return gated.mul_(layer.mlp.up_proj(x_RLD))


def add_ffn(layer: Any, axes: Axes, mid_RLD: Tensor, activations_RLF: Tensor) -> Tensor:
    """The layer's output, given the stream after attention and the FFN's activations."""
    return _added(layer, axes.ffn_output_norm, mid_RLD, layer.mlp.down_proj(activations_RLF))


def run_ffn(layer: Any, axes: Axes, mid_RLD: Tensor) -> Tensor:
    """The layer's output, given the stream after attention."""
    output_RLD = layer.mlp(getattr(layer, axes.ffn_input_norm)(mid_RLD))
    return _added(layer, axes.ffn_output_norm, mid_RLD, output_RLD)


def add_attention(layer: Any, axes: Axes, hidden_RLD: Tensor, heads_RLA: Tensor) -> Tensor:
    """The stream after attention, given the stream before it and the heads' concatenated
    outputs."""
    output_RLD = layer.self_attn.o_proj(heads_RLA)
    return _added(layer, axes.attention_output_norm, hidden_RLD, output_RLD)


def _added(layer: Any, norm: str | None, stream_RLD: Tensor, output_RLD: Tensor) -> Tensor:
    return stream_RLD + (output_RLD if norm is None else getattr(layer, norm)(output_RLD))


@contextmanager
def inputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Record a module's input at every call within the context; None records nothing."""
    seen: list[Tensor] = []

    def note_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    with nullcontext() if module is None else module.register_forward_pre_hook(note_input):
        yield seen


@contextmanager
def _forward_replaced(modules: Any, forward: Any) -> Iterator[None]:
    modules = list(modules)
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


Stream = list[Tensor]
"""The residual stream [R, L, D] for every batch, at one point in the model."""


@dataclass(frozen=True)
class Streams:
    """Runs the calibration batches through one model's layers."""

    model: Any
    axes: Axes
    batches: OwnBatches
    inputs: Sequence[LayerInputs]
    dtype: Any

    @property
    def layers(self) -> Any:
        return decoder_layers(self.model)

    def start(self) -> Stream:
        return [one.hidden_RLD for one in self.inputs]

    def after_attention(self, layer: nn.Module, index: int, stream: Stream) -> Stream:
        """The stream between a layer's attention and its FFN, for every batch."""
        with products(self.model, self.dtype):
            return [
                after_attention(layer, self.axes, hidden_RLD, one.extras[index])
                for hidden_RLD, one in zip(stream, self.inputs, strict=True)
            ]

    def after_ffn(self, layer: nn.Module, mids: Stream) -> Stream:
        """The stream after the layer, given the stream between its attention and its FFN."""
        with products(self.model, self.dtype):
            return [run_ffn(layer, self.axes, mid_RLD) for mid_RLD in mids]

    @torch.no_grad()
    def after_layer(self, index: int, stream: Stream) -> Stream:
        with products(self.model, self.dtype):
            return [
                run_layer(self.layers[index], hidden_RLD, one.extras[index])
                for hidden_RLD, one in zip(stream, self.inputs, strict=True)
            ]

    def rows(self, stream: Stream) -> list[Tensor]:
        """Every batch's counted rows, [N, D] each, in float32."""
        return [
            values[batch.counted_RL].float()
            for values, batch in zip(stream, self.batches, strict=True)
        ]

    def row_weights(self, stream: Stream) -> list[Tensor]:
        """Every batch's `row_weight`."""
        return [row_weight(x, batch) for x, batch in zip(stream, self.batches, strict=True)]


def row_weight(stream_RLD: Tensor, batch: Batch) -> Tensor:
    """1 / rms of the counted rows, [N]. The next norm divides by the rms, so only relative errors
    matter.

    These weights also keep a few tokens with a huge norm (attention sinks) from dominating the
    refit.
    """
    return stream_RLD[batch.counted_RL].square().mean(-1).clamp_min(1e-12).rsqrt()
