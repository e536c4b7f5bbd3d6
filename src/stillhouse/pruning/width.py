"""Cut every layer to the same sizes, from the first layer to the last.

Two streams run in parallel: the full model's, and the partly cut model's. Each layer's down
projection is refit so that the cut stream moves back toward the full one, which also compensates
for errors of the layers before it and for dropped layers right after it.

Within a layer, the hidden size is cut first, then heads, then experts, and then the FFN.

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
from stillhouse.pruning.axes import Axes
from stillhouse.pruning.calibrate import (
    OwnBatches,
    Stream,
    Streams,
    add_attention,
    add_ffn,
    ffn_activations,
    inputs_of,
    layer_inputs,
    products,
    row_weight,
)
from stillhouse.pruning.correction import (
    ProjectionRows,
    channel_gains,
    fit_projection,
    scale_ffn_output,
)
from stillhouse.pruning.experts import best_experts, narrow_experts
from stillhouse.pruning.layer_streaming import on_device
from stillhouse.pruning.local_distillation import distill_block
from stillhouse.pruning.offload import is_offloaded, offload, release_ends, take_own
from stillhouse.pruning.refit import (
    Moments,
    Ranking,
    agreed_cut,
    choose_and_refit,
    choose_heads_and_refit,
    summed_moments,
)
from stillhouse.pruning.sizes import HiddenMethod, Sizes
from stillhouse.pruning.surgery import keep_experts, keep_heads, keep_neurons
from stillhouse.signals.lm_head import summed_kl
from stillhouse.teachers.backbone import lm_head

KL_BATCHES = 2
"""Number of calibration batches on which the cut model's KL is measured."""


@dataclass(frozen=True)
class Passage:
    """The full model's stream before, inside, and after one layer, and the inputs of its output
    norms."""

    before: Stream
    mid: Stream
    after: Stream
    attention_wrote: Stream
    ffn_wrote: Stream


@torch.no_grad()
def cut_width(
    model: Any,
    axes: Axes,
    batches: OwnBatches,
    *,
    kept_layers: Sequence[int],
    before: Sizes,
    after: Sizes,
    hidden_method: HiddenMethod | None,
    reconstruct: bool,
    dtype: torch.dtype,
    ranking: Ranking,
    local_tokens: int = 0,
    passages: list[Passage] | None = None,
) -> tuple[float, tuple[float, ...]]:
    """Cut `kept_layers`, the embeddings, and the head in place. Layers to be dropped are not cut.

    Returns KL(full ‖ cut) in nats/token on the first calibration rows, which the cut was fit to,
    and for each kept layer, the fraction of its error that local distillation removed.

    hidden_method: None leaves the hidden size alone.
    ranking: how parts are ranked; ranking by `refit` needs `reconstruct`.
    local_tokens: tokens of local distillation per layer; 0: none.
    passages: the model's passages on these rows, layer by layer, if they are already known; those
        that are missing are appended.
    """
    inputs = [layer_inputs(model, batch) for batch in batches]
    streams = Streams(model, axes, batches, inputs, dtype)
    norm, full_head = model.base_model.norm, lm_head(model)
    basis = head_DD = None
    if hidden_method is not None:
        head_DD = hidden.head_gram(full_head.weight_VD)
        moments = hidden.measure_stream(streams, kept_layers, head_DD)
        if hidden_method == "channels":
            score_D = None if ranking.fisher is None else ranking.fisher["channels"][0]
            scored = reconstruct and ranking.by == "refit"
            basis = hidden.best_channels(moments, after.hidden_size, scored, score_D)
        else:
            basis = hidden.leading_directions(moments, after.hidden_size)
        basis = hidden.agreed_basis(basis, batches.processes)
    cutter = _Cutter(streams, kept_layers, before, after, basis, reconstruct, ranking, local_tokens)
    full, narrow, gains = cutter.cut_layers(passages)
    few = batches[: max(0, KL_BATCHES - batches.numbers.start)]
    full_rows = [norm(x_RLD)[one.counted_RL] for x_RLD, one in zip(full, few, strict=False)]
    if basis is not None and head_DD is not None:
        fit = hidden.fit_full_stream(streams, norm, basis, full, narrow, reconstruct)
        hidden.narrow_ends(model, axes, basis, fit, head_DD)
        hidden.note_hidden_size(model, after.hidden_size)
    terms = [(0.0, 0.0)] * len(batches)
    for place, full_ND in enumerate(full_rows):
        narrow_ND = norm(narrow[place])[batches[place].counted_RL]
        (kl,) = summed_kl(full_head, full_ND, [narrow_ND], lm_head(model))
        terms[place] = kl, len(full_ND)
    total, rows = batches.sum_pairs(terms)
    return total / max(rows, 1), tuple(gains)


@dataclass(frozen=True)
class _Cutter:
    """Cuts one layer after another, each part of it in turn; the parts' methods return the cut
    stream after the layer. basis: None if the hidden size is left alone."""

    streams: Streams
    kept_layers: Sequence[int]
    before: Sizes
    after: Sizes
    basis: hidden.Basis | None
    reconstruct: bool
    ranking: Ranking
    local_tokens: int

    def cut_layers(self, passages: list[Passage] | None) -> tuple[Stream, Stream, list[float]]:
        """Cut all layers. Return the full and the cut stream after the last layer, and the gains
        of local distillation."""
        gains: list[float] = []
        streams = self.streams
        offloaded = is_offloaded(streams.model)
        release_ends(streams.model)
        layers, tokens = streams.layers, sum(one.input_ids_RL.numel() for one in streams.batches)
        full = streams.start()
        narrow = self._projected(full)
        with bar("Cutting the layers", tokens * len(layers)) as advance:
            for index, layer in enumerate(layers):
                kept = index in self.kept_layers
                if kept:
                    take_own(layer)
                with on_device(layer, streams.model.device, changed=kept):
                    # The full stream is computed before the layer's weights are cut.
                    if passages is not None and index < len(passages):
                        passage = passages[index]
                    else:
                        passage = self._run_full(index, full)
                        if passages is not None:
                            passages.append(passage)
                    if kept:
                        target, before = self._target(index, passage), narrow
                        narrow = self._cut_layer(index, passage, narrow, target)
                        if self.local_tokens:
                            tokens_ = self.local_tokens
                            gains.append(distill_block(streams, index, before, target, tokens_))
                            narrow = streams.after_layer(index, before)
                if offloaded:
                    offload(layer)
                full = passage.after
                advance(tokens)
        return full, narrow, gains

    def _target(self, index: int, passage: Passage) -> Stream:
        """The full stream after a layer and any dropped layers that follow it, projected."""
        streams, layers, target = self.streams, self.streams.layers, passage.after
        following = [kept for kept in self.kept_layers if kept > index]
        for dropped in range(index + 1, min(following, default=len(layers))):
            with on_device(layers[dropped], streams.model.device):
                mids = streams.after_attention(layers[dropped], dropped, target)
                target = streams.after_ffn(layers[dropped], mids)
        return self._projected(target)

    def _projected(self, stream: Stream) -> Stream:
        return stream if self.basis is None else [self.basis.project(x_RLD) for x_RLD in stream]

    def _run_full(self, index: int, before: Stream) -> Passage:
        streams, axes, layer = self.streams, self.streams.axes, self.streams.layers[index]
        norms = [
            None if name is None else getattr(layer, name)
            for name in (axes.attention_output_norm, axes.ffn_output_norm)
        ]
        with inputs_of(norms[0]) as attention_wrote:
            mid = streams.after_attention(layer, index, before)
        with inputs_of(norms[1]) as ffn_wrote:
            after = streams.after_ffn(layer, mid)
        return Passage(before, mid, after, attention_wrote, ffn_wrote)

    def _cut_layer(self, index: int, passage: Passage, narrow: Stream, target: Stream) -> Stream:
        """target: already projected."""
        axes, layer = self.streams.axes, self.streams.layers[index]
        if self.basis is not None:
            norms = "input_layernorm", axes.attention_output_norm
            readers = hidden.attention_readers(layer)
            self._narrow(layer, norms, readers, passage.before, narrow, passage.attention_wrote)
            hidden.narrow_writer(layer.self_attn.o_proj, self.basis)
        if self.after.heads < self.before.heads:
            mids = self._cut_heads(index, narrow, passage.mid)
        else:
            mids = self.streams.after_attention(layer, index, narrow)
        if self.basis is not None:
            norms = axes.ffn_input_norm, axes.ffn_output_norm
            readers = hidden.ffn_readers(layer, axes)
            self._narrow(layer, norms, readers, passage.mid, mids, passage.ffn_wrote)
            hidden.narrow_ffn_writer(layer, axes, self.basis)
        if axes.experts:
            return self._cut_mixture(layer, mids, target)
        return self._cut_ffn(index, mids, target)

    def _narrow(
        self,
        layer: Any,
        norms: tuple[str, str | None],
        readers: Sequence[hidden.Reader],
        full: Stream,
        narrow: Stream,
        wrote: Stream,
    ) -> None:
        """Cut one block's norms and the weights that read the stream."""
        assert self.basis is not None
        streams, norm = self.streams, getattr(layer, norms[0])
        fit = hidden.fit_full_stream(streams, norm, self.basis, full, narrow, self.reconstruct)
        hidden.narrow_reader(streams.axes, norm, readers, self.basis, fit)
        if norms[1] is not None:
            hidden.narrow_output_norm(streams, getattr(layer, norms[1]), self.basis, wrote)

    def _cut_heads(self, index: int, narrow: Stream, full_mid: Stream) -> Stream:
        """Return the cut stream between the layer's attention and its FFN."""
        streams, axes, layer = self.streams, self.streams.axes, self.streams.layers[index]
        output = layer.self_attn.o_proj
        before, after, ranking = self.before, self.after, self.ranking
        with inputs_of(output) as read:
            streams.after_attention(layer, index, narrow)
        # No error term: the following down projection corrects it (docs/pruning.md).
        rows = (
            (heads_RLA[batch.counted_RL].float(), row_weight(target_RLD, batch))
            for batch, heads_RLA, target_RLD in zip(
                streams.batches, read, self._projected(full_mid), strict=True
            )
        )
        moments = summed_moments(streams.batches, rows, output.weight, ranking)
        score_H = None if ranking.fisher is None else ranking.fisher["heads"][index]

        def cut() -> Sequence[Tensor]:
            return choose_heads_and_refit(
                output.weight, moments, before, after, ranking, self.reconstruct, score_H
            )

        width = after.heads * before.head_dim
        kept_K, output_DK = agreed_cut(streams.batches.processes, cut, output.weight, width)
        heads = (kept_K[:: before.head_dim] // before.head_dim).tolist()
        keep_heads(layer, before, heads, output_DK)
        with products(streams.model, streams.dtype):
            return [
                add_attention(layer, axes, x_RLD, heads_RLA[..., kept_K])
                for x_RLD, heads_RLA in zip(narrow, read, strict=True)
            ]

    def _cut_mixture(self, layer: Any, mids: Stream, target: Stream) -> Stream:
        streams, axes, after = self.streams, self.streams.axes, self.after
        batches, keep = streams.batches, after.ffn_size
        rows = list(zip(streams.rows(mids), streams.row_weights(target), strict=True))
        if after.experts != self.before.experts:
            assert after.experts is not None
            keep_experts(layer, best_experts(layer, axes, batches, rows, after.experts))
        if keep < self.before.ffn_size:
            narrow_experts(layer, axes, batches, rows, keep, self.reconstruct, self.ranking)
        return self._with_gains(layer, mids, streams.after_ffn(layer, mids), target)

    def _cut_ffn(self, index: int, mids: Stream, target: Stream) -> Stream:
        streams, axes, layer = self.streams, self.streams.axes, self.streams.layers[index]
        ranking, keep = self.ranking, self.after.ffn_size
        down, ffn = layer.mlp.down_proj, self.before.ffn_size
        with products(streams.model, streams.dtype):
            activations = [ffn_activations(layer, axes, mid_RLD) for mid_RLD in mids]

        def read(place: int, part: slice) -> Tensor:
            return activations[place][streams.batches[place].counted_RL][part].float()

        def error(place: int, part: slice, read_nF: Tensor) -> Tensor:
            missing_RLD = target[place] - mids[place]
            missing_nD = missing_RLD[streams.batches[place].counted_RL][part]
            return missing_nD - nn.functional.linear(read_nF, down.weight, down.bias)

        # A norm after the FFN is not linear, so the layer is then refit to its own output instead.
        refit = self.reconstruct and axes.ffn_output_norm is None
        rows = ProjectionRows(streams.row_weights(target), read, error if refit else None)
        moments = Moments.zeros(ffn, down.weight.device, absolute=ranking.aggregation == "mean")
        weight_DF = fit_projection(streams.batches, rows, moments, down.weight)

        def cut() -> Sequence[Tensor]:
            if keep == ffn:
                return torch.arange(ffn, device=weight_DF.device), weight_DF
            score_F = None if ranking.fisher is None else ranking.fisher["neurons"][index]
            return choose_and_refit(weight_DF, moments, keep, ranking, self.reconstruct, score_F)

        kept_K, down_DK = agreed_cut(streams.batches.processes, cut, down.weight, keep)
        keep_neurons(layer, kept_K, down_DK)
        with products(streams.model, streams.dtype):
            after = [
                add_ffn(layer, axes, mid_RLD, activations_RLF[..., kept_K])
                for mid_RLD, activations_RLF in zip(mids, activations, strict=True)
            ]
        if axes.ffn_output_norm is None:
            return after
        return self._with_gains(layer, mids, after, target)

    def _with_gains(self, layer: Any, mids: Stream, after: Stream, target: Stream) -> Stream:
        """Scale the channels of an FFN's output to bring the stream closer to the target."""
        if not self.reconstruct:
            return after
        rows = []
        for batch, mid_RLD, after_RLD, target_RLD in zip(
            self.streams.batches, mids, after, target, strict=True
        ):
            counted, weight_N1 = batch.counted_RL, row_weight(target_RLD, batch)[:, None]
            wrote_ND = (after_RLD - mid_RLD)[counted].float() * weight_N1
            rows.append((wrote_ND, (target_RLD - after_RLD)[counted].float() * weight_N1))
        zeros_D = torch.zeros_like(layer.input_layernorm.weight)
        gain_D = channel_gains(self.streams.batches, rows, zeros_D)
        scale_ffn_output(layer, self.streams.axes, gain_D)
        return [
            mid_RLD + gain_D * (after_RLD - mid_RLD)
            for mid_RLD, after_RLD in zip(mids, after, strict=True)
        ]
