"""Attention relations agree with a loop over windows, heads, and positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from stillhouse.errors import SignalError
from stillhouse.objectives import AttentionStates, capture, relation_loss
from tests.objectives.test_features import model


def states(width: int, windows: int = 2, length: int = 5, seed: int = 0) -> AttentionStates:
    g = torch.Generator().manual_seed(seed)
    return AttentionStates(
        {
            name: torch.randn(windows, length, width, generator=g, requires_grad=True)
            for name in ("query", "key", "value")
        }
    )


def slow_relation(
    x_LW: torch.Tensor, heads: int, head: int, i: int, allowed: list[int]
) -> torch.Tensor:
    size = x_LW.shape[1] // heads
    part = x_LW[:, head * size : (head + 1) * size]
    scores = torch.stack([part[i] @ part[j] / math.sqrt(size) for j in allowed])
    return torch.log_softmax(scores, 0)


def slow_loss(
    student: AttentionStates, teacher: AttentionStates, heads: int, mask_RLL: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros(())
    for name in ("query", "key", "value"):
        for r, mask_LL in enumerate(mask_RLL):
            for i, row in enumerate(mask_LL):
                allowed = row.nonzero()[:, 0].tolist()
                if not allowed:
                    continue
                for head in range(heads):
                    log_q = slow_relation(student[name][r], heads, head, i, allowed)
                    log_p = slow_relation(teacher[name][r], heads, head, i, allowed)
                    total = total + (log_p.exp() * (log_p - log_q)).sum() / heads / 3
    return total


@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_a_loop_for_different_widths_and_masks(packed: bool) -> None:
    student, teacher = states(8), states(24, seed=1)
    mask_RLL = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    if packed:  # two documents per window, and padding at the end
        document = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
        mask_RLL &= document[:, :, None] == document[:, None, :]
        mask_RLL[1, 4] = False
    found = relation_loss(student, teacher, heads=4, mask_RLL=mask_RLL if packed else None)
    expected = slow_loss(student, teacher, 4, mask_RLL)
    torch.testing.assert_close(found.total, expected)
    leaves = list(student.values())
    torch.testing.assert_close(
        torch.autograd.grad(found.total, leaves), torch.autograd.grad(expected, leaves)
    )
    assert found.total.item() == pytest.approx(sum(v.item() for v in found.terms.values()) / 3)


def test_the_loss_of_models_of_different_sizes_trains_the_student() -> None:
    student, teacher = model(2, 16), model(4, 32)
    ids_RL = torch.randint(0, 31, (2, 6))
    with capture(student.model.layers[1].self_attn) as of_student:
        student(ids_RL)
    with torch.no_grad(), capture(teacher.model.layers[2].self_attn) as of_teacher:
        teacher(ids_RL)
    loss = relation_loss(of_student, of_teacher, heads=2)
    loss.total.backward()
    assert loss.total > 0
    assert student.model.layers[1].self_attn.q_proj.weight.grad is not None
    assert student.model.layers[0].mlp.up_proj.weight.grad is not None
    assert not student.model.layers[1].self_attn.q_proj._forward_hooks


def test_a_fused_projection_is_split_into_query_key_and_value() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 31}
    config = Phi3Config(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)
    phi3 = Phi3ForCausalLM(config).eval()
    attention = phi3.model.layers[0].self_attn
    inputs = []
    attention.qkv_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with capture(attention) as found:
        phi3(torch.randint(0, 31, (2, 6)))
    weights = attention.qkv_proj.weight.split([16, 8, 8])
    for name, weight in zip(("query", "key", "value"), weights, strict=True):
        torch.testing.assert_close(found[name], inputs[0] @ weight.T)


def test_equal_attention_states_have_no_loss() -> None:
    same = states(8)
    assert relation_loss(same, same, heads=2).total.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("key"), "student's key states are missing"),
        (lambda s: s.update(query=torch.zeros(2, 5, 9)), "width 9"),
        (
            lambda s: s.update(value=torch.zeros(2, 4, 8)),
            r"the student's value states have shape .* \(2, 4\)",
        ),
    ],
)
def test_an_error_names_attention_states_that_do_not_match(
    spoil: Callable[[AttentionStates], Any], message: str
) -> None:
    student = states(8)
    spoil(student)
    with pytest.raises(SignalError, match=message):
        relation_loss(student, states(8), heads=2)


def test_a_layer_without_separate_projections_is_rejected() -> None:
    with pytest.raises(SignalError, match="Linear has no q_proj"), capture(torch.nn.Linear(2, 2)):
        pass


def test_an_unknown_relation_is_rejected() -> None:
    with pytest.raises(SignalError, match="unknown relation 'output'"):
        relation_loss(states(8), states(8), heads=2, relations=["output"])
