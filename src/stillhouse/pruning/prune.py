"""Prune a teacher in place: layers, then the sizes inside them, then the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stillhouse.data.windows import WindowSet
from stillhouse.errors import RecipeError
from stillhouse.pruning.axes import axes_of
from stillhouse.pruning.calibrate import calibration_batches, products
from stillhouse.pruning.depth import SCORES, DepthChoice, choose_layers, layer_scores
from stillhouse.pruning.gradients import BATCH_TOKENS as GRADIENT_TOKENS
from stillhouse.pruning.gradients import Fisher, Part, mask_fisher
from stillhouse.pruning.offload import is_offloaded, offload, released_after_use
from stillhouse.pruning.pruning_config import PruningMethod
from stillhouse.pruning.refit import Ranking
from stillhouse.pruning.sizes import (
    HiddenMethod,
    Sizes,
    check_sizes,
    set_sizes,
    size_notes,
    sizes_of,
)
from stillhouse.pruning.surgery import (
    check_parameters,
    check_tokens,
    keep_layers,
    keep_tokens,
    own_config,
)
from stillhouse.pruning.width import Passage, cut_width
from stillhouse.shared_work import ALONE, Processes

DEPTH_TOKENS = 2048
"""Tokens on which layers are tried: few, because each trial runs half the model on average."""
GRADIENT_CALIBRATION_TOKENS = 8192
"""Maximum number of tokens for gradients: they need a backward pass, and rankings settle early."""
METHOD = PruningMethod()


@dataclass(frozen=True)
class PruneReport:
    """What was removed, and what that costs before any training.

    changed: sizes before and after, for every axis that was cut.
    dropped_layers: the teacher's layer numbers in order of removal, each with the KL to the teacher
        after removing it, in nats/token.
    single_layer_kl: for each layer, the KL without only that layer; empty if depth was not cut, or
        layers were ranked by scores.
    calibration_tokens: number of tokens that the cut was calibrated on, without padding.
    calibration_kl: KL(teacher ‖ pruned) on some of the calibration rows (so it is optimistic),
        before the vocabulary is cut; None if nothing else was cut.
    local_gains: for each layer, the fraction of its error that local distillation removed, on rows
        that the layer was not trained on.
    """

    ffn_size: tuple[int, int]
    layers: tuple[int, int]
    changed: dict[str, tuple[int, int]]
    kept_layers: tuple[int, ...]
    dropped_layers: tuple[tuple[int, float], ...]
    single_layer_kl: tuple[float, ...]
    calibration_tokens: int
    calibration_kl: float | None
    reconstructed: bool
    local_gains: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Calibration:
    """Results that several prunes with the same start model, text, and seed share, so that they are
    computed only once.

    passages: the start model's stream on the calibration rows; None: not kept.
    depth: the order in which its layers are removed.
    """

    passages: list[Passage] | None = field(default_factory=list)
    depth: DepthChoice | None = None

    def choose_layers(self, keep: int, total: int) -> DepthChoice | None:
        """The layers to keep; None if the order of removal is not known that far."""
        gone = total - keep
        if self.depth is None or len(self.depth.dropped) < gone:
            return None
        dropped = self.depth.dropped[:gone]
        kept = {*range(total)} - {index for index, _ in dropped}
        return DepthChoice(tuple(sorted(kept)), dropped, self.depth.single_kl)


def prune_model(
    model: Any,
    windows: WindowSet,
    *,
    hidden_method: HiddenMethod = "channels",
    kept_ids: Sequence[int] | None = None,
    reconstruct: bool = True,
    calibration_tokens: int = 49152,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shared: Calibration | None = None,
    method: PruningMethod = METHOD,
    local_tokens: int = 0,
    processes: Processes = ALONE,
    **sizes: int | None,
) -> PruneReport:
    """Prune a float32 causal language model in place, on its device, calibrated on training
    windows.

    Depth is cut first, so that refitting the width also compensates for dropped layers. Hidden
    size, heads, experts, and FFN follow, layer by layer, and the vocabulary comes last. All layers
    end up with the same sizes.

    Args:
        hidden_method: how hidden_size is cut. "rotation" unties the head, and rotates even if the
            size does not change.
        kept_ids: the tokens to keep, kept_ids[new id] = old id (see `kept_token_ids`).
        reconstruct: refit the remaining weights to compensate for the removed ones.
        dtype: of the matrix products that run the windows through the model; weights, statistics,
            and refits are always float32.
        shared: results of earlier prunes of the same start model with the same windows, tokens, and
            seed; this prune's results are added.
        method: how the parts to keep are chosen.
        local_tokens: tokens of block-wise distillation per layer.
        processes: each of them calls this with a copy of the model, and they share the windows and
            the trials of layers. Each copy ends up with the same weights as with one process.
        sizes: the sizes to prune to, by their names in `sizes.AXES`; a size that is missing or None
            does not change.

    Raises:
        RecipeError: the model cannot have these sizes.
        ModelError: the architecture cannot be pruned.
        DataError: there are no windows.
    """
    axes = axes_of(model.config)
    vocabulary = None if kept_ids is None else len(kept_ids)
    targets = {**sizes, "vocabulary": vocabulary}
    after = check_sizes(model.config, targets, hidden_method=hidden_method)
    before = sizes_of(model.config)
    check_importance(method, before, after)
    check_parameters(model, axes)
    if kept_ids is not None:
        check_tokens(model, kept_ids)
    own_config(model)
    batches = calibration_batches(
        windows, calibration_tokens, seed, model.device, processes=processes
    )
    tokens, seen = batches.tokens()
    rotated = sizes.get("hidden_size") is not None and hidden_method == "rotation"
    notes = size_notes(model.config, before, after, rotated)
    if tokens < calibration_tokens:
        notes.insert(0, f"calibrated on all {seen:,} training tokens, not {calibration_tokens:,}")
    elif 2 * seen < calibration_tokens:
        notes.insert(
            0,
            f"calibrated on {seen:,} training tokens, not {calibration_tokens:,}: the rest of the "
            "windows is padding or not trained on (data.packing: isolated fills windows)",
        )
    shared = Calibration(passages=None) if shared is None else shared
    choice = DepthChoice(tuple(range(before.layers)), (), ())
    if after.layers < before.layers:
        if known := shared.choose_layers(after.layers, before.layers):
            choice = known
        else:
            choice = shared.depth = rank_layers(
                model, windows, after.layers, method, seed, dtype, processes=processes
            )
        if reconstruct and (axes.ffn_output_norm is not None or axes.experts):
            notes.append(
                f"{model.config.model_type}: only the gain of the preceding FFN's output, not its "
                "projections, compensates for dropped layers; local_distillation compensates for "
                "more"
            )
    kl = choice.dropped[-1][1] if choice.dropped else None
    narrower = replace(after, layers=before.layers, vocabulary=before.vocabulary) != before
    gains: tuple[float, ...] = ()
    if narrower or rotated or (choice.dropped and (reconstruct or local_tokens)):
        touched = rotated or after.hidden_size < before.hidden_size
        kinds = _gradient_parts(before, after, touched and not rotated)
        ranking = Ranking(method.importance, method.aggregation)
        if method.importance == "gradients":
            fisher = _fisher(model, windows, kinds, seed, dtype, processes) if kinds else None
            ranking = Ranking("gradients" if kinds else "refit", fisher=fisher)
        kl, gains = cut_width(
            model,
            axes,
            batches,
            kept_layers=choice.kept,
            before=before,
            after=after,
            hidden_method=hidden_method if touched else None,
            reconstruct=reconstruct and (narrower or bool(choice.dropped)),
            dtype=dtype,
            local_tokens=local_tokens,
            ranking=ranking,
            passages=shared.passages,
        )
    keep_layers(model, choice.kept)
    set_sizes(model.config, replace(after, vocabulary=before.vocabulary))
    if kept_ids is not None:
        keep_tokens(model, torch.tensor(kept_ids, device=model.device))
    if is_offloaded(model):
        offload(model)  # Includes the embeddings and the head.
    changes = {name: (size, getattr(after, name)) for name, size in vars(before).items()}
    return PruneReport(
        ffn_size=(before.ffn_size, after.ffn_size),
        layers=(before.layers, after.layers),
        changed={name: sizes for name, sizes in changes.items() if sizes[0] != sizes[1]},
        kept_layers=choice.kept,
        dropped_layers=choice.dropped,
        single_layer_kl=choice.single_kl,
        calibration_tokens=seen,
        calibration_kl=kl,
        reconstructed=reconstruct,
        local_gains=gains,
        notes=tuple(notes),
    )


def rank_layers(
    model: Any,
    windows: WindowSet,
    keep: int,
    method: PruningMethod,
    seed: int,
    dtype: torch.dtype,
    *,
    tokens: int = DEPTH_TOKENS,
    most_kl: float = math.inf,
    processes: Processes = ALONE,
) -> DepthChoice:
    """Rank layers by `method.depth_importance`: the order of removal, and the KL after each."""
    few = calibration_batches(windows, tokens, seed, model.device)
    by, scores = method.depth_importance, None
    with released_after_use(model):
        if by == "gradients":
            fisher = _fisher(model, windows, ["layers"], seed, dtype, processes)
            scores = torch.cat(fisher["layers"]).tolist()
        with products(model, dtype):
            if by in SCORES:
                scores = processes.from_main(layer_scores(model, few, by))
            return choose_layers(
                model, few, keep, scores=scores, most_kl=most_kl, processes=processes
            )


def check_importance(method: PruningMethod, before: Sizes, after: Sizes) -> None:
    """Raise RecipeError if `method` cannot rank the parts that are cut."""
    if method.importance != "gradients" or before.experts is None:
        return
    if after.experts != before.experts:
        raise RecipeError(
            "gradients cannot rank experts",
            where="student.importance",
            fix="remove importance: experts are ranked by how much they add to the stream",
        )
    if after.ffn_size < before.ffn_size:
        raise RecipeError(
            "gradients cannot rank the neurons of experts",
            where="student.importance",
            fix="use importance: refit or activations",
        )


def _gradient_parts(before: Sizes, after: Sizes, channels: bool) -> list[Part]:
    """The parts to cut that gradients can rank."""
    cut: dict[Part, bool] = {
        "neurons": after.ffn_size < before.ffn_size,
        "heads": after.heads < before.heads,
        "channels": channels,
    }
    return [part for part, is_cut in cut.items() if is_cut]


def _fisher(
    model: Any,
    windows: WindowSet,
    kinds: Sequence[Part],
    seed: int,
    dtype: torch.dtype,
    processes: Processes,
) -> Fisher:
    tokens = GRADIENT_CALIBRATION_TOKENS
    batches = calibration_batches(windows, tokens, seed, model.device, GRADIENT_TOKENS, processes)
    return mask_fisher(model, axes_of(model.config), batches, kinds, seed=seed, dtype=dtype)
