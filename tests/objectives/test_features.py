"""Layer maps, hidden-state losses, and losses on logits of intermediate layers."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.errors import SignalError
from stillhouse.objectives import HiddenStateLoss, Term, fused_loss, layer_logits_loss, map_layers
from stillhouse.signals import DenseSignal, LMHead


def model(layers: int, width: int, vocab: int = 31) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
    )
    return LlamaForCausalLM(config)


def hidden_rows(of: LlamaForCausalLM, ids_RL: torch.Tensor) -> list[torch.Tensor]:
    states = of.model(ids_RL, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1) for state in states]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((3, 6), ((1, 2), (2, 4), (3, 6))),
        ((4, 4), ((1, 1), (2, 2), (3, 3), (4, 4))),
        ((2, 5), ((1, 3), (2, 5))),
        ((6, 3), ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3))),
        ((3, 6, "last"), ((1, 4), (2, 5), (3, 6))),
        ((6, 2, "last"), ((5, 1), (6, 2))),
        ((3, 6, [(0, 0), (3, 6)]), ((0, 0), (3, 6))),
    ],
)
def test_map_layers_pairs_the_layers_of_student_and_teacher(
    arguments: tuple[Any, ...], expected: tuple[Any, ...]
) -> None:
    assert map_layers(*arguments) == expected


def test_a_map_can_keep_only_its_last_pairs_and_include_the_embeddings() -> None:
    assert map_layers(3, 6, "last", count=2) == ((2, 5), (3, 6))
    assert map_layers(3, 6, count=1, embeddings=True) == ((0, 0), (3, 6))


@pytest.mark.parametrize("student", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("teacher", [1, 2, 3, 5, 8, 30])
def test_a_uniform_map_ends_at_the_last_layers_and_never_reaches_the_embeddings(
    student: int, teacher: int
) -> None:
    pairs = map_layers(student, teacher)
    assert pairs[-1] == (student, teacher)
    assert [s for s, _ in pairs] == list(range(1, student + 1))
    layers = [t for _, t in pairs]
    assert layers == sorted(layers)
    if teacher >= student:
        assert len(set(layers)) == len(layers)
        assert min(layers) >= 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ([], "the layer map is empty"),
        ([(4, 1)], "the student has no layer 4"),
        ([(1, 7)], "the teacher has no layer 7"),
        ([(1, 1), (1, 1)], "a pair twice"),
    ],
)
def test_impossible_maps_are_rejected(how: list[Any], message: str) -> None:
    with pytest.raises(SignalError, match=message):
        map_layers(3, 6, how)


def test_more_pairs_than_layers_are_rejected() -> None:
    with pytest.raises(SignalError, match="4 pairs does not fit 3 student"):
        map_layers(3, 6, count=4)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_loss_of_models_of_different_sizes_agrees_with_its_definition(
    kind: Literal["mse", "cosine"],
) -> None:
    """Every pair contributes equally, and the last pair compares the last hidden states."""
    student, teacher = model(2, 16), model(4, 24)
    ids_RL = torch.randint(0, 31, (2, 5))
    loss = HiddenStateLoss(map_layers(2, 4), 16, 24, kind)
    found = loss(hidden_rows(student, ids_RL), hidden_rows(teacher, ids_RL))
    found.total.backward()
    expected = 0.0
    with torch.no_grad():
        s, t = hidden_rows(student, ids_RL), hidden_rows(teacher, ids_RL)
        for pair, projection in zip([(1, 2), (2, 4)], loss.projections, strict=True):
            for a, b in zip(s[pair[0]], t[pair[1]], strict=True):
                a = projection.weight @ a
                if kind == "mse":
                    expected += ((a - b) ** 2).sum().item() / 24 / 2
                else:
                    expected += (1 - (a @ b) / (a.norm() * b.norm())).item() / 2
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    assert set(found.terms) == {f"{kind}@1-2", f"{kind}@2-4"}
    assert found.rows == 10
    assert student.model.embed_tokens.weight.grad is not None
    assert all(p.weight.grad is not None for p in loss.projections)
    assert teacher.model.embed_tokens.weight.grad is None


def test_projections_are_not_part_of_the_student_and_not_needed_at_equal_widths() -> None:
    student = model(2, 16)
    before = set(student.state_dict())
    loss = HiddenStateLoss(map_layers(2, 4), 16, 24)
    assert set(student.state_dict()) == before
    assert len(list(loss.parameters())) == 2
    assert not list(HiddenStateLoss(map_layers(2, 4), 16, 16).parameters())


def test_losses_of_parts_of_the_rows_add_up_and_row_weights_select_rows() -> None:
    torch.manual_seed(0)
    student, teacher = [torch.randn(6, 4) for _ in range(3)], [torch.randn(6, 4) for _ in range(3)]
    loss = HiddenStateLoss(map_layers(2, 2), 4, 4)
    whole = loss(student, teacher)
    parts = [loss([h[rows] for h in student], [h[rows] for h in teacher])
             for rows in (slice(0, 1), slice(1, 6))]  # fmt: skip
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item())
    only_first = torch.tensor([1.0, 0, 0, 0, 0, 0])
    weighted = loss(student, teacher, only_first)
    assert weighted.total.item() == pytest.approx(parts[0].total.item())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([torch.zeros(3, 4)], [torch.zeros(3, 4)] * 3, "student's layer 1 are missing"),
        ([torch.zeros(3, 4)] * 3, [torch.zeros(2, 4)] * 3, "has 2 rows"),
        ([torch.zeros(3, 4)] * 3, [torch.zeros(3, 5)] * 3, "width 4, but layer 1"),
        ([torch.zeros(1, 3, 4)] * 3, [torch.zeros(3, 4)] * 3, r"shape \(1, 3, 4\)"),
    ],
)
def test_an_error_names_hidden_states_that_do_not_match(
    student: list[Any], teacher: list[Any], message: str
) -> None:
    with pytest.raises(SignalError, match=message):
        HiddenStateLoss(map_layers(2, 2), 4, 4)(student, teacher)


def test_an_intermediate_layer_predicts_through_the_final_norm_and_lm_head() -> None:
    student, teacher = model(2, 16), model(4, 24)
    ids_RL = torch.randint(0, 31, (2, 5))
    rows, head = hidden_rows(student, ids_RL), LMHead(student.lm_head.weight)
    signal = DenseSignal(hidden_rows(teacher, ids_RL)[-1], LMHead(teacher.lm_head.weight))
    terms = [Term("forward_kl")]
    found = layer_logits_loss({1: rows[1]}, student.model.norm, head, terms, signal=signal)
    expected = fused_loss(student.model.norm(rows[1]), head, terms, signal=signal)
    assert torch.equal(found.total, expected.total)
    assert list(found.terms) == ["forward_kl@layer1"]

    both = layer_logits_loss(
        {1: rows[1], 0: rows[0]}, student.model.norm, head, terms, signal=signal
    )
    assert both.total.item() == pytest.approx(sum(v.item() for v in both.terms.values()) / 2)
    both.total.backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad is not None
