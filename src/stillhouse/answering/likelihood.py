"""The likelihood of other models' answers under a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stillhouse.data.chat_prompt import text_ids
from stillhouse.data.turn_end import turn_end
from stillhouse.generation.chat_frame import answer_prompt_ids
from stillhouse.generation.request import Message
from stillhouse.signals.lm_head import head_logits
from stillhouse.teachers.backbone import lm_head


@torch.inference_mode()
def mean_surprise(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], answers: Sequence[str]
) -> float:
    """Mean of -log p(answer | prompt) under the model, in nats/token over all answers. The end-of-
    turn token is included, so that an empty answer is not free."""
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    last = turn_end(tokenizer)
    end = [] if last is None else [last.id]
    for messages, answer in zip(prompts, answers, strict=True):
        prompt = answer_prompt_ids(tokenizer, messages)
        target = [*text_ids(tokenizer, answer), *end]
        ids_1L = torch.tensor([[*prompt, *target]], device=device)
        states_LD = model.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
        logits_LV = head_logits(lm_head(model), states_LD[len(prompt) - 1 : -1]).float()
        picked_L = logits_LV.log_softmax(-1).gather(1, ids_1L[0, len(prompt) :, None])
        total, tokens = total - float(picked_L.sum()), tokens + len(target)
    return total / max(1, tokens)
