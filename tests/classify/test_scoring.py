"""Scoring all labels in one pass over their tree agrees with one pass for each text and label."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, MistralConfig, MistralForCausalLM

from stillhouse.classify import label_scoring as scoring
from stillhouse.classify.label_scoring import (
    ROOT,
    label_scores,
    label_tree,
    score_pairs,
    shared_prefix,
    tree_log_probabilities,
)
from tests import tiny

TEXTS = ["hello there", "x", "a longer text with some words in it", "hello"]
ANSWERS = ["a card.", "a car.", "a card swap.", "zebra.", "z."]


def ids(texts: list[str]) -> list[list[int]]:
    words = tiny.tokenizer()
    return [words(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_a_tree_contains_each_common_prefix_once() -> None:
    tree = label_tree([[1, 2, 3], [1, 2, 4], [5], [1, 6]])
    assert tree.nodes_T.tolist() == [1, 2]
    assert tree.depths_T.tolist() == [0, 1]
    assert tree.sees_TT.tolist() == [[True, False], [True, True]]
    edges = list(zip(tree.edge_nodes_E.tolist(), tree.edge_tokens_E.tolist(), strict=True))
    assert edges == [(ROOT, 1), (0, 2), (1, 3), (1, 4), (ROOT, 5), (0, 6)]
    assert tree.members_CE.sum(1).tolist() == [3, 3, 1, 2]


@pytest.mark.parametrize("answers", [ANSWERS, ["a", "b", "c"]], ids=["many tokens", "one token"])
@pytest.mark.parametrize("start", ["the same start: ", ""], ids=["prefix", "no prefix"])
def test_the_tree_scores_labels_like_single_passes(answers: list[str], start: str) -> None:
    model = tiny.llama()
    prompts, labels = ids([f"{start}{text} ->" for text in TEXTS]), ids(answers)
    torch.testing.assert_close(
        label_scores(model, prompts, labels), score_pairs(model, prompts, labels)
    )


def test_batches_of_one_text_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    prompts, labels = ids([f"start {text}" for text in TEXTS]), ids(ANSWERS)
    together = label_scores(model, prompts, labels)
    monkeypatch.setattr(scoring, "TOKENS_TOGETHER", 1)
    monkeypatch.setattr(scoring, "_HEAD_ROWS", 3)
    torch.testing.assert_close(label_scores(model, prompts, labels), together)


@pytest.mark.parametrize("together", [16384, 40])
def test_a_model_with_a_sliding_window_scores_labels_like_single_passes(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(scoring, "_CACHED_TOKENS", together)
    config = MistralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    prompts, labels = ids(["a longer text than the window", "so"]), ids(["yes", "no", "z"])
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = label_scores(model, prompts, labels)
    if together > 1000:
        assert len(passes) == 2 * len(prompts)
    torch.testing.assert_close(found, score_pairs(model, prompts, labels))


def test_a_model_with_alibi_scores_labels_like_single_passes() -> None:
    config = FalconConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True
    )
    torch.manual_seed(0)
    model = FalconForCausalLM(config).eval()
    prompts, labels = ids(TEXTS), ids(ANSWERS)
    torch.testing.assert_close(
        label_scores(model, prompts, labels), score_pairs(model, prompts, labels)
    )


def test_gradients_flow_through_the_tree() -> None:
    model = tiny.llama()
    model.requires_grad_(True)
    tree_log_probabilities(model, ids(TEXTS), label_tree(ids(ANSWERS))).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_the_shared_prefix_leaves_each_prompt_at_least_one_token() -> None:
    assert shared_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert shared_prefix([[1, 2], [1, 2, 4]]) == 1
    assert shared_prefix([[1, 2], [1, 2]]) == 1
    assert shared_prefix([[7]]) == 0
