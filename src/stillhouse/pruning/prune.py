"""Prunes a teacher: first layers, then FFN width, both by what the calibration text shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stillhouse.data import WindowSet
from stillhouse.pruning.axes import axes_of, check_sizes
from stillhouse.pruning.calibrate import calibration_batches, products
from stillhouse.pruning.depth import choose_layers
from stillhouse.pruning.surgery import keep_layers, own_config
from stillhouse.pruning.width import cut_width

DEPTH_TOKENS = 2048
"""Tokens on which layers are tried: each try runs half the model, so few must do."""


@dataclass(frozen=True)
class PruneReport:
    """What was removed, and what it costs before any training.

    dropped_layers: the teacher's layer numbers in the order they went, and the KL to the teacher
    after each, in nats a token. single_layer_kl: the KL without that layer alone, by layer; empty
    when depth was not cut. calibration_kl: KL(teacher ‖ pruned) on some of the calibration rows,
    so it flatters; None when width was not cut.
    """

    ffn_size: tuple[int, int]
    layers: tuple[int, int]
    kept_layers: tuple[int, ...]
    dropped_layers: tuple[tuple[int, float], ...]
    single_layer_kl: tuple[float, ...]
    calibration_tokens: int
    calibration_kl: float | None
    reconstructed: bool
    notes: tuple[str, ...] = ()


def prune_model(
    model: Any,
    windows: WindowSet,
    *,
    ffn_size: int | None = None,
    layers: int | None = None,
    reconstruct: bool = True,
    calibration_tokens: int = 16384,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PruneReport:
    """Prunes a float32 causal language model in place, calibrated on training windows.

    The windows run through the model with matrix products in `dtype`; weights, statistics and
    refits stay float32. Runs on the model's device.

    Depth goes first, so that the refit of the width makes up for dropped layers too. Every layer
    ends with the same FFN width. Raises RecipeError for sizes that the model cannot have,
    ModelError for an architecture that cannot be pruned, DataError when there are no windows.
    """
    check_sizes(model.config, ffn_size, layers)
    axes = axes_of(model.config)
    own_config(model)
    before = (model.config.intermediate_size, model.config.num_hidden_layers)
    ffn_size = before[0] if ffn_size is None else ffn_size
    layers = before[1] if layers is None else layers

    batches = calibration_batches(windows, calibration_tokens, seed, model.device)
    seen = sum(int(batch.counted_RL.sum()) for batch in batches)
    notes: list[str] = []
    if sum(batch.input_ids_RL.numel() for batch in batches) < calibration_tokens:
        notes.append(f"calibrated on all {seen:,} training tokens: {calibration_tokens:,} asked")

    kept: tuple[int, ...] = tuple(range(before[1]))
    dropped: tuple[tuple[int, float], ...] = ()
    single: tuple[float, ...] = ()
    kl: float | None = None
    if layers < before[1]:
        few = calibration_batches(windows, DEPTH_TOKENS, seed, model.device)
        with products(model, dtype):
            choice = choose_layers(model, few, layers)
        kept, dropped, single = choice.kept, choice.dropped, choice.single_kl
        kl = dropped[-1][1]
    if ffn_size < before[0] or (dropped and reconstruct):
        kl = cut_width(
            model,
            axes,
            batches,
            kept_layers=kept,
            ffn_size=ffn_size,
            reconstruct=reconstruct,
            dtype=dtype,
        )
    keep_layers(model, kept)
    model.config.intermediate_size = ffn_size
    return PruneReport(
        ffn_size=(before[0], ffn_size),
        layers=(before[1], layers),
        kept_layers=kept,
        dropped_layers=dropped,
        single_layer_kl=single,
        calibration_tokens=seen,
        calibration_kl=kl,
        reconstructed=reconstruct,
        notes=tuple(notes),
    )
