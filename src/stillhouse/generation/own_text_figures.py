"""Measurements of a model's own text, as plain data that is saved as JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OwnText:
    """Measurements of a model's own answers: means over all their tokens, or over all answers.

    forward_kl: KL(teacher ‖ model), and reverse_kl: KL(model ‖ teacher), in nats/token; both are 0
    for the teacher itself. entropy: of the model, in nats/token. teacher_logprob: the mean
    log-probability of the answers' tokens under the teacher. length: tokens per answer, with the
    token that ends it. cut_off: share of answers that the limit ended. repetition: share of 4-grams
    that occur earlier in the same answer. compared: tokens that a teacher with another tokenizer is
    compared at, over shared roots; None: all.
    """

    forward_kl: float
    reverse_kl: float
    entropy: float
    teacher_logprob: float
    length: float
    cut_off: float
    repetition: float
    answers: int
    tokens: int
    compared: int | None = None
