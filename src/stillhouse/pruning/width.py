"""Cuts every layer to the same sizes, from the first to the last, each fed by what is cut already.

Two streams run side by side: the full model's, and that of the model as cut so far. Each layer's
down projection is refit so that the cut stream comes back towards the full one: a layer also makes
up for the layers before it, and for dropped layers right after it.

In a layer the hidden size is cut first, then heads, then experts, then the FFN.

Shapes: R windows of a batch, L tokens, N rows, D hidden width, A attention width, F FFN width,
K kept neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.progress import bar
from stillhouse.pruning import hidden
from stillhouse.pruning.axes import Axes, part
from stillhouse.pruning.calibrate import (
    Batch,
    add_attention,
    add_ffn,
    ffn_activations,
    inputs_of,
    layer_inputs,
    products,
)
from stillhouse.pruning.correction import Evidence
from stillhouse.pruning.experts import best_experts, narrow_experts
from stillhouse.pruning.ffn import (
    Moments,
    Ranking,
    activation_scores,
    best,
    refit_and_remove,
    refit_to,
)
from stillhouse.pruning.gains import channel_gains, scale_ffn_output
from stillhouse.pruning.heads import Grouping, heads_by_score, refit_and_remove_heads
from stillhouse.pruning.hidden import Basis
from stillhouse.pruning.local_distillation import after_layer, distill_block
from stillhouse.pruning.offload import is_offloaded, offload, release_ends
from stillhouse.pruning.sizes import HiddenMethod, Sizes
from stillhouse.pruning.streams import Stream, Streams
from stillhouse.pruning.surgery import keep_experts, keep_heads, keep_neurons
from stillhouse.signals.lm_head import summed_kl
from stillhouse.teachers.backbone import lm_head

KL_BATCHES = 2
"""Calibration batches on which the cut model's KL is measured."""


@dataclass(frozen=True)
class Damage:
    """kl: KL(full ‖ cut) in nats a token on the first calibration rows, which the cut has seen.

    local_gains: of each layer that stays, the share of its error that local distillation undid.
    """

    kl: float
    local_gains: tuple[float, ...]


@dataclass(frozen=True)
class Cut:
    """What becomes of every layer that stays. basis: None where the hidden size is not touched.

    ranking: what decides what goes; `refit` needs `reconstruct`. local_tokens: tokens of local
    distillation a layer, 0 for none.
    """

    kept_layers: Sequence[int]
    before: Sizes
    after: Sizes
    basis: Basis | None
    reconstruct: bool
    ranking: Ranking
    local_tokens: int = 0


@dataclass(frozen=True)
class Passage:
    """The full model's stream around one layer, and what the norms of its blocks' outputs read."""

    before: Stream
    mid: Stream
    after: Stream
    attention_wrote: Stream
    ffn_wrote: Stream


@torch.no_grad()
def cut_width(
    model: Any,
    axes: Axes,
    batches: Sequence[Batch],
    *,
    kept_layers: Sequence[int],
    before: Sizes,
    after: Sizes,
    hidden_method: HiddenMethod | None,
    reconstruct: bool,
    dtype: torch.dtype,
    ranking: Ranking | None = None,
    local_tokens: int = 0,
    passages: list[Passage] | None = None,
) -> Damage:
    """Cuts `kept_layers` in place, and the model's ends; layers that will be dropped stay.

    hidden_method: None leaves the hidden size alone. passages: the same model's on the same rows,
    layer by layer, where they are known; an empty list is filled.
    """
    ranking = Ranking() if ranking is None else ranking
    fisher = ranking.fisher
    inputs = [layer_inputs(model, batch) for batch in batches]
    streams = Streams(model, axes, batches, inputs, dtype)
    norm, full_head = model.base_model.norm, lm_head(model)
    basis = head_DD = None
    if hidden_method is not None:
        head_DD = hidden.head_gram(full_head.weight_VD)
        moments = hidden.measure_stream(streams, kept_layers, head_DD)
        if hidden_method == "channels":
            score_D = None if fisher is None else fisher.channels
            scored = reconstruct and ranking.by == "refit"
            basis = hidden.best_channels(moments, after.hidden_size, scored, score_D)
        else:
            basis = hidden.leading_directions(moments, after.hidden_size)
    cut = Cut(kept_layers, before, after, basis, reconstruct, ranking, local_tokens)
    full, narrow, gains = _cut_layers(streams, cut, passages)
    few = batches[:KL_BATCHES]
    full_rows = [norm(x_RLD)[one.counted_RL] for x_RLD, one in zip(full, few, strict=False)]
    if basis is not None and head_DD is not None:
        found = hidden.guess(streams, norm, basis, full, narrow, reconstruct)
        hidden.narrow_ends(model, axes, basis, found, head_DD)
        hidden.note_hidden_size(model, after.hidden_size)
    total, rows = 0.0, 0
    for one, full_ND, x_RLD in zip(few, full_rows, narrow, strict=False):
        total += summed_kl(full_head, full_ND, [norm(x_RLD)[one.counted_RL]], lm_head(model))[0]
        rows += int(one.counted_RL.sum())
    return Damage(total / max(rows, 1), tuple(gains))


def _cut_layers(
    streams: Streams, cut: Cut, passages: list[Passage] | None
) -> tuple[Stream, Stream, list[float]]:
    """Cuts all layers; returns the full and the cut stream behind the last one, and the gains."""
    gains: list[float] = []
    offloaded = is_offloaded(streams.model)
    release_ends(streams.model)
    layers, tokens = streams.layers, streams.tokens()
    full = narrow = streams.start()
    if cut.basis is not None:
        narrow = [cut.basis.project(x_RLD) for x_RLD in full]
    with bar("Cutting the layers", tokens * len(layers)) as advance:
        for index, layer in enumerate(layers):
            # The full stream leaves the layer before its weights are cut.
            if passages is not None and index < len(passages):
                passage = passages[index]
            else:
                passage = _run_full(streams, layer, index, full)
                if passages is not None:
                    passages.append(passage)
            if index in cut.kept_layers:
                target = passage.after
                for following in range(index + 1, _next(cut.kept_layers, index, len(layers))):
                    mids = streams.after_attention(layers[following], following, target)
                    target = streams.after_ffn(layers[following], mids)
                before = narrow
                narrow = _cut_layer(streams, cut, index, passage, narrow, target)
                if cut.local_tokens:
                    wanted = target if cut.basis is None else list(map(cut.basis.project, target))
                    gains.append(distill_block(streams, index, before, wanted, cut.local_tokens))
                    narrow = after_layer(streams, index, before)
            if offloaded:
                offload(layer)
            full = passage.after
            advance(tokens)
    return full, narrow, gains


def _next(kept_layers: Sequence[int], index: int, total: int) -> int:
    return min((kept for kept in kept_layers if kept > index), default=total)


def _run_full(streams: Streams, layer: nn.Module, index: int, before: Stream) -> Passage:
    axes = streams.axes
    norms = [
        None if name is None else part(layer, name)
        for name in (axes.attention_output_norm, axes.ffn_output_norm)
    ]
    with inputs_of(norms[0]) as attention_wrote:
        mid = streams.after_attention(layer, index, before)
    with inputs_of(norms[1]) as ffn_wrote:
        after = streams.after_ffn(layer, mid)
    return Passage(before, mid, after, attention_wrote, ffn_wrote)


def _cut_layer(
    streams: Streams, cut: Cut, index: int, passage: Passage, narrow: Stream, target: Stream
) -> Stream:
    """Cuts one layer whole; returns the cut stream behind it."""
    axes, layer, basis = streams.axes, streams.layers[index], cut.basis
    if basis is not None:
        target = [basis.project(x_RLD) for x_RLD in target]
        _narrow_attention(streams, cut, layer, basis, passage, narrow)
    if cut.after.heads < cut.before.heads:
        mids = _cut_heads(streams, cut, index, narrow, passage.mid)
    else:
        mids = streams.after_attention(layer, index, narrow)
    if basis is not None:
        _narrow_ffn(streams, cut, layer, basis, passage, mids)
    if axes.experts is None:
        return _cut_ffn(streams, cut, index, mids, target)
    return _cut_mixture(streams, cut, layer, mids, target)


def _narrow_attention(
    streams: Streams, cut: Cut, layer: nn.Module, basis: Basis, passage: Passage, narrow: Stream
) -> None:
    axes = streams.axes
    norm = part(layer, axes.attention_input_norm)
    found = hidden.guess(streams, norm, basis, passage.before, narrow, cut.reconstruct)
    hidden.narrow_reader(axes, norm, hidden.attention_readers(layer, axes), basis, found)
    hidden.narrow_writer(part(layer, f"{axes.attention}.{axes.output}"), basis)
    if axes.attention_output_norm is not None:
        norm = part(layer, axes.attention_output_norm)
        hidden.narrow_output_norm(streams, norm, basis, passage.attention_wrote, axes)


def _narrow_ffn(
    streams: Streams, cut: Cut, layer: nn.Module, basis: Basis, passage: Passage, mids: Stream
) -> None:
    axes = streams.axes
    norm = part(layer, axes.ffn_input_norm)
    found = hidden.guess(streams, norm, basis, passage.mid, mids, cut.reconstruct)
    hidden.narrow_reader(axes, norm, hidden.ffn_readers(layer, axes), basis, found)
    hidden.narrow_ffn_writer(layer, axes, basis)
    if axes.ffn_output_norm is not None:
        norm = part(layer, axes.ffn_output_norm)
        hidden.narrow_output_norm(streams, norm, basis, passage.ffn_wrote, axes)


def _cut_heads(streams: Streams, cut: Cut, index: int, narrow: Stream, full_mid: Stream) -> Stream:
    """Cuts one layer's heads; returns the cut stream between its attention and its FFN."""
    axes, layer = streams.axes, streams.layers[index]
    output = part(layer, f"{axes.attention}.{axes.output}")
    before, after = cut.before, cut.after
    grouping = Grouping(before.kv_heads, before.heads // before.kv_heads, before.head_dim)
    share = after.heads // after.kv_heads
    with inputs_of(output) as heads:
        streams.after_attention(layer, index, narrow)
    width, hidden_size = output.in_features, output.out_features
    mean = cut.ranking.aggregation == "mean"
    moments = Moments.zeros(width, hidden_size, output.weight.device, absolute=mean)
    for batch, heads_RLA, mid_RLD in zip(streams.batches, heads, full_mid, strict=True):
        target_RLD = mid_RLD if cut.basis is None else cut.basis.project(mid_RLD)
        read_NA = heads_RLA[batch.counted_RL].float()
        # No error: the down projection behind it undoes what there is (docs/pruning.md).
        moments.add(read_NA, None, _row_weight(target_RLD, batch))
    if cut.reconstruct and cut.ranking.by == "refit":
        kept, output_DA = refit_and_remove_heads(
            output.weight, moments, grouping, after.kv_heads, share
        )
    else:
        score_A = activation_scores(moments, output.weight)
        score_H = score_A.view(before.heads, before.head_dim).sum(1)
        if cut.ranking.fisher is not None:
            score_H = cut.ranking.fisher.heads[index]
        kept = heads_by_score(score_H, grouping, after.kv_heads, share)
        columns = torch.tensor(grouping.columns(kept), device=output.weight.device)
        output_DA = output.weight[:, columns]
        if cut.reconstruct:
            output_DA = refit_to(output.weight, moments, columns)
    keep_heads(layer, axes, grouping, kept, output_DA)
    columns = torch.tensor(grouping.columns(kept), device=output.weight.device)
    with products(streams.model, streams.dtype):
        return [
            add_attention(layer, axes, x_RLD, heads_RLA[..., columns])
            for x_RLD, heads_RLA in zip(narrow, heads, strict=True)
        ]


def _cut_mixture(
    streams: Streams, cut: Cut, layer: nn.Module, mids: Stream, target: Stream
) -> Stream:
    """Cuts one layer's experts; returns the cut stream behind it."""
    axes = streams.axes
    weights = [
        _row_weight(target_RLD, batch)
        for target_RLD, batch in zip(target, streams.batches, strict=True)
    ]
    rows = streams.rows(mids)
    if cut.after.experts != cut.before.experts:
        assert cut.after.experts is not None
        keep_experts(layer, axes, best_experts(layer, axes, rows, weights, cut.after.experts))
    if cut.after.ffn_size < cut.before.ffn_size:
        keep = cut.after.ffn_size
        narrow_experts(layer, axes, rows, weights, keep, cut.reconstruct, cut.ranking)
    after = streams.after_ffn(layer, mids)
    return _with_gains(streams, cut, layer, mids, after, target)


def _cut_ffn(streams: Streams, cut: Cut, index: int, mids: Stream, target: Stream) -> Stream:
    """Cuts one layer's FFN; returns the cut stream behind it."""
    axes, layer, ranking = streams.axes, streams.layers[index], cut.ranking
    ffn_size = cut.after.ffn_size
    down = part(layer, f"{axes.ffn}.{axes.down}")
    width, ffn = down.weight.shape
    mean = ranking.aggregation == "mean"
    evidence = Evidence(ffn, width, down.weight.device, absolute=mean)
    activations: list[Tensor] = []
    for batch, mid_RLD, target_RLD in zip(streams.batches, mids, target, strict=True):
        with products(streams.model, streams.dtype):
            activations.append(ffn_activations(layer, axes, mid_RLD))
        read_NF = activations[-1][batch.counted_RL].float()
        error_ND = None
        # A norm after the FFN is no linear map, so there each layer refits to its own output.
        if cut.reconstruct and axes.ffn_output_norm is None:
            wrote_ND = nn.functional.linear(read_NF, down.weight, down.bias)
            error_ND = (target_RLD - mid_RLD)[batch.counted_RL] - wrote_ND
        evidence.add(read_NF, error_ND, _row_weight(target_RLD, batch))
    moments, change_DF = evidence.finish()
    weight_DF = down.weight + change_DF
    if ffn_size == ffn:
        kept_K, down_DK = torch.arange(ffn, device=weight_DF.device), weight_DF
    elif cut.reconstruct and ranking.by == "refit":
        kept_K, down_DK = refit_and_remove(weight_DF, moments, ffn_size)
    else:
        score_F = activation_scores(moments, weight_DF)
        if ranking.fisher is not None:
            score_F = ranking.fisher.neurons[index]
        kept_K = best(score_F, ffn_size)
        down_DK = weight_DF[:, kept_K]
        if cut.reconstruct:
            down_DK = refit_to(weight_DF, moments, kept_K)
    keep_neurons(layer, axes, kept_K, down_DK)
    with products(streams.model, streams.dtype):
        after = [
            add_ffn(layer, axes, mid_RLD, activations_RLF[..., kept_K])
            for mid_RLD, activations_RLF in zip(mids, activations, strict=True)
        ]
    if axes.ffn_output_norm is None:
        return after
    return _with_gains(streams, cut, layer, mids, after, target)


def _with_gains(
    streams: Streams, cut: Cut, layer: nn.Module, mids: Stream, after: Stream, target: Stream
) -> Stream:
    """The stream behind a layer whose FFN's output is brought nearer to the target by its gain."""
    if not cut.reconstruct:
        return after
    batches = []
    for batch, mid_RLD, after_RLD, target_RLD in zip(
        streams.batches, mids, after, target, strict=True
    ):
        rows, weight_N1 = batch.counted_RL, _row_weight(target_RLD, batch)[:, None]
        wrote_ND = (after_RLD - mid_RLD)[rows].float() * weight_N1
        batches.append((wrote_ND, (target_RLD - after_RLD)[rows].float() * weight_N1))
    gain_D = channel_gains(batches)
    scale_ffn_output(layer, streams.axes, gain_D)
    return [
        mid_RLD + gain_D * (after_RLD - mid_RLD)
        for mid_RLD, after_RLD in zip(mids, after, strict=True)
    ]


def _row_weight(target_RLD: Tensor, batch: Batch) -> Tensor:
    """1 / rms of the stream: the next norm divides by it, so that only relative errors matter.

    It also keeps a few tokens of huge norm (attention sinks) from deciding the whole refit.
    """
    return target_RLD[batch.counted_RL].square().mean(-1).clamp_min(1e-12).rsqrt()
