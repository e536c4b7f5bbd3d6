"""Narrow the residual stream: which channels or directions to keep, and how layers read them.

The stream x (D) becomes Mᵀx (H). The columns of M are H columns of the identity (channels), or the
H leading eigenvectors of the stream's second moments (rotation; SliceGPT, Ashkboos et al. 2024,
arXiv 2401.15024, but with one M for the whole model, so that skip connections need no matrix).

A weight W that reads the stream sees y = x / rms(x), multiplied by a norm's gain g. In the narrow
model it sees z = Mᵀx / rms(Mᵀx) instead, and the least-squares estimate of y is A z:

    A = c M + R,     R = (Y - Z cMᵀ)ᵀ Z (ZᵀZ + λ·mean(diag ZᵀZ)·I)⁻¹,     W' = W diag(g) A / g'

c, one number per norm, corrects for the rms over fewer channels. The new gain g' is c·g for the
kept channels, or 1 after a rotation, where gains cannot be applied per channel. If M is square,
nothing is cut, c = 1, and R = 0: the rotated model is equivalent to the original.

Shapes: N rows, D hidden width, H narrow hidden width, O outputs of a reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.pruning.axes import Axes
from stillhouse.pruning.calibrate import Stream, Streams
from stillhouse.pruning.layer_streaming import on_device
from stillhouse.pruning.offload import release
from stillhouse.pruning.refit import RIDGE, Moments, best, refit_and_remove, regularized_inverse
from stillhouse.pruning.surgery import set_parameter, set_weight
from stillhouse.shared_work import Processes

BLOCK = 4096
"""Rows of a weight that are processed at a time, since the head of a large vocabulary is large."""


@dataclass(frozen=True)
class Basis:
    """M [D, H], with orthonormal columns. kept_H: the kept channels, ascending; None: rotation."""

    matrix_DH: Tensor
    kept_H: Tensor | None = None

    @property
    def square(self) -> bool:
        return self.matrix_DH.shape[0] == self.matrix_DH.shape[1]

    def project(self, x: Tensor) -> Tensor:
        """x M, along the last dimension."""
        return x @ self.matrix_DH if self.kept_H is None else x[..., self.kept_H]


@dataclass(frozen=True)
class StreamMoments:
    """Second moments of the stream, and of the weights that read it.

    C_DD: C = Σ yᵀy over all norms' inputs, with each row divided by its rms.
    G_DD: G = Σ WᵀW over all readers, with the norms' gains folded in and each reader divided by its
        output's energy.
    """

    C_DD: Tensor
    G_DD: Tensor


def gram(weight_OD: Tensor, less_D: Tensor | float = 0.0) -> Tensor:
    """WᵀW [D, D] of a weight whose rows have `less_D` subtracted."""
    hidden = weight_OD.shape[1]
    G_DD = torch.zeros(hidden, hidden, device=weight_OD.device)
    for rows_OD in weight_OD.split(BLOCK):
        less_OD = rows_OD - less_D
        G_DD.addmm_(less_OD.T, less_OD)
    return G_DD


def head_gram(weight_VD: Tensor) -> Tensor:
    """WᵀW of the head's weight minus its mean row, which the softmax ignores."""
    return gram(weight_VD, weight_VD.mean(0))


def best_channels(
    moments: StreamMoments, keep: int, reconstruct: bool, score_D: Tensor | None = None
) -> Basis:
    """The channels to keep, so that losing the others costs the readers least.

    reconstruct: whether readers will estimate the lost channels from the kept ones.
    score_D: each channel's importance, if channels are to be ranked by that instead.
    """
    if score_D is None and reconstruct:
        # Only the sum G of the readers' WᵀW matters, so a square root of G can replace their rows.
        values_D, vectors_DD = torch.linalg.eigh(moments.G_DD)
        root_DD = values_D.clamp_min(0).sqrt()[:, None] * vectors_DD.T
        kept_H, _ = refit_and_remove(root_DD, Moments(moments.C_DD.triu()), keep)
    else:
        if score_D is None:
            score_D = moments.C_DD.diagonal() * moments.G_DD.diagonal()
        kept_H = best(score_D, keep)
    return Basis(torch.eye(len(moments.C_DD), device=kept_H.device)[:, kept_H], kept_H)


def leading_directions(moments: StreamMoments, keep: int) -> Basis:
    """The eigenvectors of C with the largest eigenvalues, which keep most of the stream's
    energy."""
    _, vectors_DD = torch.linalg.eigh(moments.C_DD.double())
    return Basis(vectors_DD.flip(1)[:, :keep].float().contiguous())


def agreed_basis(basis: Basis, processes: Processes) -> Basis:
    """Broadcast the main process's basis to all processes."""
    tensors = [basis.matrix_DH, *([] if basis.kept_H is None else [basis.kept_H])]
    return Basis(*processes.from_owner(0, lambda: tensors, lambda: tensors))


def unit_rows(norm: Any, x: Tensor) -> Tensor:
    """x / rms(x): a norm's output before its gain."""
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def gain(norm: Any, axes: Axes) -> Tensor:
    values_D: Tensor = norm.weight + axes.norm_offset
    return values_D


Reader = tuple[Any, str]
"""A module, and its parameter that reads the stream."""


def attention_readers(layer: Any) -> list[Reader]:
    attention = layer.self_attn
    return [(linear, "weight") for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]


def ffn_readers(layer: Any, axes: Axes) -> list[Reader]:
    if axes.experts:
        return [(layer.mlp.gate, "weight"), (layer.mlp.experts, "gate_up_proj")]
    return [(layer.mlp.gate_proj, "weight"), (layer.mlp.up_proj, "weight")]


def measure_stream(streams: Streams, kept_layers: Sequence[int], head_DD: Tensor) -> StreamMoments:
    """Measure the moments of the full model's stream at every input norm of the kept layers and at
    the final norm.

    head_DD: see `head_gram`.
    """
    axes, hidden = streams.axes, len(head_DD)
    moments = StreamMoments(torch.zeros_like(head_DD), torch.zeros_like(head_DD))

    def add(norm: Any, stream: Stream, grams: Iterable[Tensor]) -> None:
        """Add one norm's inputs, and its readers' WᵀW [D, D]."""
        rows = (unit_rows(norm, x_ND) for x_ND in streams.rows(stream))
        terms = ([y_ND.T @ y_ND] for y_ND in rows)
        (C_DD,) = streams.batches.sum(terms, lambda: [torch.zeros_like(head_DD)])
        moments.C_DD.add_(C_DD)
        gain_D = gain(norm, axes)
        for gram_DD in grams:
            G_DD = gain_D[:, None] * gram_DD * gain_D
            moments.G_DD.add_(G_DD / (G_DD * C_DD).sum().clamp_min(1e-12))

    def grams(readers: Sequence[Reader]) -> Iterator[Tensor]:
        return (gram(getattr(module, name).reshape(-1, hidden)) for module, name in readers)

    stream = streams.start()
    for index, layer in enumerate(streams.layers):
        with on_device(layer, streams.model.device):
            mids = streams.after_attention(layer, index, stream)
            if index in kept_layers:
                add(layer.input_layernorm, stream, grams(attention_readers(layer)))
                add(getattr(layer, axes.ffn_input_norm), mids, grams(ffn_readers(layer, axes)))
            stream = streams.after_ffn(layer, mids)
        release(layer)
    add(streams.model.base_model.norm, stream, [head_DD])
    return moments


@dataclass(frozen=True)
class StreamFit:
    """The fit y ≈ A z at one norm. scale: c. A_DH: None if nothing was cut, or without a refit."""

    scale: float
    A_DH: Tensor | None
    ZZ_HH: Tensor
    YZ_DH: Tensor


def fit_full_stream(
    streams: Streams, norm: Any, basis: Basis, full: Stream, cut: Stream, reconstruct: bool
) -> StreamFit:
    """Fit `norm`'s output on the full stream, by least squares, from its output on the narrow
    stream."""
    D, H = basis.matrix_DH.shape
    ZZ_HH = torch.zeros(H, H, device=basis.matrix_DH.device)
    YZ_DH = torch.zeros(D, H, device=basis.matrix_DH.device)
    if basis.square:
        return StreamFit(1.0, None, ZZ_HH, YZ_DH)

    def terms() -> Iterator[list[Tensor]]:
        for x_ND, narrow_NH in zip(streams.rows(full), streams.rows(cut), strict=True):
            z_NH = unit_rows(norm, narrow_NH)
            yield [z_NH.T @ z_NH, unit_rows(norm, x_ND).T @ z_NH]

    ZZ_HH, YZ_DH = streams.batches.sum(terms(), lambda: [ZZ_HH.clone(), YZ_DH.clone()])
    scale = ((basis.matrix_DH * YZ_DH).sum() / ZZ_HH.trace().clamp_min(1e-12)).item()
    if not reconstruct:
        return StreamFit(scale, None, ZZ_HH, YZ_DH)
    A_DH = scale * basis.matrix_DH
    unit = ZZ_HH.diagonal().mean().clamp_min(1e-12)
    inverse_HH = regularized_inverse(ZZ_HH / unit, RIDGE)
    A_DH = A_DH + ((YZ_DH - A_DH @ ZZ_HH) / unit) @ inverse_HH
    return StreamFit(scale, A_DH, ZZ_HH, YZ_DH)


def narrow_reader(
    axes: Axes, norm: Any, readers: Sequence[Reader], basis: Basis, fit: StreamFit
) -> None:
    """Cut a norm's gain, and the input side of the weights that read its output."""
    old_D = gain(norm, axes)
    if basis.kept_H is None:
        new_H = torch.ones(basis.matrix_DH.shape[1], device=old_D.device)
    else:
        new_H = fit.scale * old_D[basis.kept_H]
    for module, name in readers:
        weight = getattr(module, name)
        if basis.kept_H is not None and fit.A_DH is None:
            narrow = weight[..., basis.kept_H]
        else:
            A_DH = fit.scale * basis.matrix_DH if fit.A_DH is None else fit.A_DH
            narrow = weight.new_empty(*weight.shape[:-1], len(new_H))
            for rows, into in zip(weight.split(BLOCK), narrow.split(BLOCK), strict=True):
                read = (rows * old_D) @ A_DH
                # With a gain of zero, nothing passes, whatever the weight is.
                into.copy_(torch.where(new_H == 0, 0.0, read / new_H))
        set_parameter(module, name, narrow)
        if isinstance(module, nn.Linear):
            module.in_features = narrow.shape[-1]
        elif hasattr(module, "hidden_dim"):
            module.hidden_dim = narrow.shape[-1]
    set_parameter(norm, "weight", new_H - axes.norm_offset)


def narrow_writer(linear: Any, basis: Basis) -> None:
    """Cut the output side of a projection that writes to the stream."""
    set_weight(linear, basis.project(linear.weight.T).T)
    if linear.bias is not None:
        set_parameter(linear, "bias", basis.project(linear.bias))


def narrow_ffn_writer(layer: Any, axes: Axes, basis: Basis) -> None:
    if axes.experts:
        experts = layer.mlp.experts
        set_parameter(experts, "down_proj", basis.project(experts.down_proj.mT).mT)
    else:
        narrow_writer(layer.mlp.down_proj, basis)


def narrow_output_norm(streams: Streams, norm: Any, basis: Basis, wrote: Stream) -> None:
    """Cut the norm of a block's output; its gain corrects for the rms over fewer channels."""
    assert basis.kept_H is not None, "models with output norms cannot be rotated"
    kept_H = basis.kept_H

    def terms() -> Iterator[tuple[float, float]]:
        for u_ND in streams.rows(wrote):
            y_NH, z_NH = unit_rows(norm, u_ND)[:, kept_H], unit_rows(norm, u_ND[:, kept_H])
            yield (y_NH * z_NH).sum().item(), z_NH.square().sum().item()

    both, own = streams.batches.sum_pairs(terms())
    scale = 1.0 if basis.square else both / (own + 1e-12)
    new_H = scale * gain(norm, streams.axes)[basis.kept_H]
    set_parameter(norm, "weight", new_H - streams.axes.norm_offset)


def narrow_ends(model: Any, axes: Axes, basis: Basis, fit: StreamFit, head_DD: Tensor) -> None:
    """Cut the embeddings, the final norm, and the head. A rotation unties the head.

    A tied head cannot be refit separately, so the final norm's gain is refit instead. The gain d
    that brings the logits (minus their mean) closest solves
    (Gₖₖ ∘ ZᵀZ) d = diag(Gₖ diag(g) YᵀZ), with G from `head_gram`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = model.base_model.norm
    D, H = basis.matrix_DH.shape
    tied = head.weight is embedding.weight
    # The model now multiplies its embeddings by √H instead of √D.
    factor = (D / H) ** 0.5 if axes.scaled_embeddings else 1.0
    if tied and basis.kept_H is not None:
        old_D, kept_H = gain(norm, axes), basis.kept_H
        new_H = fit.scale * old_D[kept_H]
        if fit.A_DH is not None:
            new_H = _best_gain(head_DD, old_D, kept_H, fit, new_H)
        set_parameter(norm, "weight", new_H / factor - axes.norm_offset)
        set_weight(head, basis.project(head.weight) * factor)
        embedding.weight = head.weight
    else:
        narrow_embedding = basis.project(embedding.weight) * factor
        narrow_reader(axes, norm, [(head, "weight")], basis, fit)
        set_parameter(embedding, "weight", narrow_embedding)
        if tied:  # The head's weights are saved separately from now on.
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}
    embedding.embedding_dim = H
    if axes.scaled_embeddings:
        embedding.scalar_embed_scale = H**0.5
        embedding.embed_scale.fill_(H**0.5)


def _best_gain(
    head_DD: Tensor, old_D: Tensor, kept_H: Tensor, fit: StreamFit, start_H: Tensor
) -> Tensor:
    G_HD = head_DD[kept_H]
    system_HH = G_HD[:, kept_H] * fit.ZZ_HH
    wanted_H = ((G_HD * old_D) * fit.YZ_DH.T).sum(1)
    unit = system_HH.diagonal().mean().clamp_min(1e-12)
    missing_H = (wanted_H - system_HH @ start_H) / unit
    return start_H + regularized_inverse(system_HH / unit, RIDGE) @ missing_H


def note_hidden_size(model: Any, size: int) -> None:
    """Update the hidden size that modules store as an attribute."""
    for module in model.modules():
        for name in ("hidden_size", "hidden_dim"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, size)
