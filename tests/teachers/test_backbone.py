"""A model's backbone and LM head together compute the model's logits."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stillhouse.errors import ModelError
from stillhouse.signals.lm_head import head_logits
from stillhouse.teachers.backbone import check_head, hidden_states, lm_head
from tests.teachers.toys import CONFIGS, tiny_model

IDS = torch.arange(3, 43).view(2, 20)
POSITIONS = torch.arange(20).expand(2, -1)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_head_applied_to_hidden_states_gives_the_models_logits(kind: str) -> None:
    model = tiny_model(kind)
    logits = head_logits(lm_head(model), hidden_states(model, IDS, POSITIONS))
    expected = model(input_ids=IDS, position_ids=POSITIONS).logits
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    check_head(model)


def test_scale_and_cap_come_from_the_configuration() -> None:
    assert lm_head(tiny_model("cohere")).scale == 0.25
    assert lm_head(tiny_model("granite")).scale == 0.25
    assert lm_head(tiny_model("gemma2")).softcap == 2.0
    plain = lm_head(tiny_model("llama"))
    assert (plain.scale, plain.softcap, plain.bias_V) == (1.0, None, None)


def test_the_heads_weight_is_not_a_copy() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert lm_head(model).weight_VD is model.get_input_embeddings().weight


def test_a_head_that_is_not_linear_is_rejected() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ModelError, match="not a linear map"):
        check_head(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "smollm3"])
def test_packed_documents_do_not_attend_to_each_other(kind: str) -> None:
    model = tiny_model(kind)
    first, second = IDS[:1, :12], IDS[1:, :8]
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    together = hidden_states(model, packed, positions)
    alone = [hidden_states(model, ids, None) for ids in (first, second)]
    assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
