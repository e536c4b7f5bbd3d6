"""The two halves of a causal language model: hidden states, and the head that computes logits.

Shapes: R windows, L tokens, N chosen rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from stillhouse.cpu_products import fast_linear
from stillhouse.errors import ModelError
from stillhouse.section import require_type
from stillhouse.signals import LMHead
from stillhouse.signals.lm_head import head_logits
from stillhouse.teachers.document_rows import run_documents, separates_documents
from stillhouse.teachers.packed_attention import document_arguments


def require_model(given: Any, name: str, load: str) -> None:
    """Raise ModelError if a function's argument is not a model. load: what loads one."""
    require_type(given, nn.Module, name, "a model", f"load it first: {load}(...)")


def lm_head(model: Any) -> LMHead:
    """The model's head with the scale and cap that its configuration applies to logits.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Falcon-H1 multiplies
    by `lm_head_multiplier`, Gemma 2 caps by `final_logit_softcapping`.
    The weight is the model's own tensor, not a copy. Raises ModelError: the model has no head.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head",
            where=model.config.name_or_path or None,
            fix="use a causal language model",
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale *= float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    cap = getattr(config, "final_logit_softcapping", None)
    return LMHead(
        weight_VD=output.weight,
        bias_V=getattr(output, "bias", None),
        scale=scale,
        softcap=None if cap is None else float(cap),
    )


def hidden_states(
    model: Any,
    input_ids_RL: Tensor,
    position_ids_RL: Tensor | None,
    documents: Tensor | None = None,
) -> Tensor:
    """The last hidden states after the final norm, [R, L, D]: the head's input.

    A document begins wherever `position_ids_RL` restarts, and documents do not attend to each
    other: transformers masks them, or they are run separately (`document_rows`). No KV cache is
    used. `model` must be unwrapped (no DDP or FSDP module around it). documents: their bounds, as
    in `Batch`; if None, computed when the model's attention needs them.
    """
    if position_ids_RL is not None and not separates_documents(model):
        (last_RLD,) = run_documents(
            model,
            lambda ids_SL: [hidden_states(model, ids_SL, None)],
            input_ids_RL,
            position_ids_RL,
        )
        return last_RLD
    with nullcontext() if checkpoints_layers(model) else fast_linear(input_ids_RL.device):
        output = model.base_model(
            input_ids=input_ids_RL,
            **({} if position_ids_RL is None else {"position_ids": position_ids_RL}),
            use_cache=False,
            return_dict=True,
            **document_arguments(model, input_ids_RL, position_ids_RL, documents),
        )
    return output.last_hidden_state


def checkpoints_layers(model: Any) -> bool:
    """Whether the backward pass recomputes layers of the model (gradient checkpointing)."""
    return model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


def trim_head(head: LMHead, vocabulary: int | None) -> LMHead:
    """The head's first `vocabulary` rows, as views; None keeps all."""
    if vocabulary is None or vocabulary == head.weight_VD.shape[0]:
        return head
    bias_V = None if head.bias_V is None else head.bias_V[:vocabulary]
    return LMHead(head.weight_VD[:vocabulary], bias_V, head.scale, head.softcap)


def float32_head(head: LMHead, vocabulary: int | None = None) -> LMHead:
    """The head in float32, cut to its first `vocabulary` rows. Logits rounded to bfloat16 would
    have ties that the model does not have."""
    head = trim_head(head, vocabulary)
    bias_V = None if head.bias_V is None else head.bias_V.float()
    return replace(head, weight_VD=head.weight_VD.float(), bias_V=bias_V)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Check that `head_logits` computes the model's own logits, on three hidden states.

    An architecture with an additional step between hidden states and logits would otherwise be
    distilled incorrectly without an error. The backbone is not run unless the model bypasses
    `base_model`'s forward, so its weights can be on the meta device or stay on disk.
    Raises ModelError: the logits differ.
    """
    if model.base_model is model:
        raise _unknown_head(model, "its backbone is not separate from the head")
    head = lm_head(model)
    D = head.weight_VD.shape[1]
    # Larger than a trained model's hidden states, so that a cap on logits shows.
    waves_ND = 4 * torch.arange(1, 3 * D + 1, dtype=torch.float32).sin().view(3, D)
    hidden_ND = waves_ND.to(head.weight_VD.device, head.weight_VD.dtype)
    ids_RL = torch.zeros(1, 3, dtype=torch.long, device=head.weight_VD.device)
    with _replaced_backbone(model, hidden_ND) as calls:
        try:
            output = model(input_ids=ids_RL, use_cache=False)
        except RuntimeError as failure:
            raise _unknown_head(model, str(failure)) from failure
    if not calls:
        hidden_ND = hidden_states(model, ids_RL, None)[0]
    expected_NV, logits_NV = output.logits[0], head_logits(head, hidden_ND)
    scale = expected_NV.float().abs().max().clamp_min(1e-6)
    error = ((logits_NV.float() - expected_NV.float()).abs().max() / scale).item()
    tolerance = 1e-4 if expected_NV.dtype == torch.float32 else 0.05
    if not error <= tolerance:
        raise _unknown_head(model, f"relative difference {error:.2g}")


def _unknown_head(model: Any, found: str) -> ModelError:
    return ModelError(
        f"the logits of {type(model).__name__} are not a linear map of its last hidden states "
        f"with a scale and a cap that Stillhouse supports ({found})",
        where=model.config.name_or_path or None,
        fix="use another architecture, or report this one",
    )


@dataclass
class _BackboneOutput(ModelOutput):
    """An output with only the last hidden states; every other field that a model reads is None."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _replaced_backbone(model: Any, hidden_ND: Tensor) -> Iterator[list[Any]]:
    """Make the backbone return `hidden_ND` for any input inside the block. Yields its calls."""
    backbone, calls = model.base_model, []

    def forward(*args: Any, **kwargs: Any) -> ModelOutput:
        calls.append(kwargs)
        return _BackboneOutput(last_hidden_state=hidden_ND[None])

    own = vars(backbone).get("forward")
    backbone.forward = forward
    try:
        yield calls
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own
