"""Targets from a teacher's scores agree with each prior's definition."""

from __future__ import annotations

import pytest
import torch

from stillhouse.classify.label_judgment import distributions, prior_logits

SCORES_NC = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1]]).log()
NEUTRAL_KC = torch.tensor([[0.5, 0.25, 0.25]]).log()


def test_the_content_free_prior_divides_by_the_answer_to_texts_without_content() -> None:
    q_NC = distributions(SCORES_NC, prior_logits("content_free", SCORES_NC, NEUTRAL_KC))
    ratio = torch.tensor([0.6 / 0.5, 0.3 / 0.25, 0.1 / 0.25])
    torch.testing.assert_close(q_NC[0], ratio / ratio.sum())


def test_the_texts_prior_divides_by_the_mean_answer() -> None:
    q_NC = distributions(SCORES_NC, prior_logits("texts", SCORES_NC, NEUTRAL_KC))
    ratio = torch.tensor([0.6 / 0.7, 0.3 / 0.2, 0.1 / 0.1])
    torch.testing.assert_close(q_NC[0], ratio / ratio.sum())


def test_the_balanced_prior_makes_all_labels_equally_frequent() -> None:
    scores_NC = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + torch.arange(4)
    q_NC = distributions(scores_NC, prior_logits("balanced", scores_NC, NEUTRAL_KC))
    torch.testing.assert_close(q_NC.mean(0), torch.full((4,), 0.25), atol=1e-4, rtol=0)


def test_without_a_prior_the_targets_are_the_teachers_probabilities() -> None:
    q_NC = distributions(SCORES_NC, prior_logits("none", SCORES_NC, NEUTRAL_KC))
    torch.testing.assert_close(q_NC, SCORES_NC.exp())


@pytest.mark.parametrize("prior", ["content_free", "texts", "balanced", "none"])
def test_adding_a_constant_to_all_scores_of_a_text_changes_nothing(prior: str) -> None:
    shifted_NC = SCORES_NC - torch.tensor([[5.0], [70.0]])
    torch.testing.assert_close(
        distributions(SCORES_NC, prior_logits(prior, SCORES_NC, NEUTRAL_KC)),  # type: ignore[arg-type]
        distributions(shifted_NC, prior_logits(prior, shifted_NC, NEUTRAL_KC)),  # type: ignore[arg-type]
    )
