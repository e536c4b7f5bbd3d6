"""The two halves of a causal language model: hidden states, and the head that makes logits.

Shapes: R windows, L tokens, N chosen rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.signals import DenseSignal, LMHead
from stillhouse.signals.lm_head import head_logits


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


def hidden_states(model: Any, input_ids_RL: Tensor, position_ids_RL: Tensor | None) -> Tensor:
    """The last hidden states after the final norm, [R, L, D]: what the head is applied to.

    Where `position_ids_RL` starts anew inside a window, transformers keeps the documents on both
    sides from seeing each other. No key-value cache. `model` must be unwrapped (no DDP, no FSDP
    module around it).
    """
    output = model.base_model(
        input_ids=input_ids_RL, position_ids=position_ids_RL, use_cache=False, return_dict=True
    )
    return output.last_hidden_state


@torch.no_grad()
def dense_signal(
    model: Any,
    input_ids_RL: Tensor,
    position_ids_RL: Tensor | None,
    chosen_RL: Tensor,
    *,
    vocabulary: int | None = None,
) -> DenseSignal:
    """The teacher's answer at the positions where `chosen_RL` (bool) is true, in row-major order.

    Position t answers what comes at t + 1. `vocabulary` cuts the head to its first rows (see
    `vocabulary.check_same_vocabulary`).
    """
    hidden_ND = hidden_states(model, input_ids_RL, position_ids_RL)[chosen_RL]
    return DenseSignal(hidden_ND=hidden_ND, head=trim_head(lm_head(model), vocabulary))


def trim_head(head: LMHead, vocabulary: int | None) -> LMHead:
    """The head's first `vocabulary` rows, as views; None keeps all."""
    if vocabulary is None or vocabulary == head.weight_VD.shape[0]:
        return head
    bias_V = None if head.bias_V is None else head.bias_V[:vocabulary]
    return LMHead(head.weight_VD[:vocabulary], bias_V, head.scale, head.softcap)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Runs three tokens and compares the model's own logits with `head_logits`.

    An architecture that does something else between hidden states and logits would otherwise be
    distilled wrongly without a sign. Raises ModelError when they differ.
    """
    head = lm_head(model)
    ids_RL = torch.arange(3, device=head.weight_VD.device)[None]
    positions_RL = ids_RL.clone()
    expected_NV = model(input_ids=ids_RL, position_ids=positions_RL, use_cache=False).logits[0]
    logits_NV = head_logits(head, hidden_states(model, ids_RL, positions_RL)[0])
    scale = expected_NV.float().abs().max().clamp_min(1e-6)
    error = ((logits_NV.float() - expected_NV.float()).abs().max() / scale).item()
    tolerance = 1e-4 if expected_NV.dtype == torch.float32 else 0.05
    if not error <= tolerance:
        raise ModelError(
            f"the logits of {type(model).__name__} are not a linear map of its last hidden states "
            f"with a scale and a cap that Stillhouse knows (relative difference {error:.2g})",
            where=model.config.name_or_path or None,
            fix="use another architecture, or report this one",
        )
