"""Measurements of a model's own text, as plain data to save as JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OwnText:
    """Measurements of a model's own answers: means over all their tokens, or over all answers.

    forward_kl: KL(teacher ‖ model), and reverse_kl: KL(model ‖ teacher), in nats/token; both are 0
    for the teacher itself. entropy: the model's, in nats/token. teacher_logprob: mean
    log-probability of the answers' tokens under the teacher. length: tokens per answer, including
    the token that ends it. cut_off: share of answers that reached the token limit. repetition:
    share of 4-grams that occur earlier in the same answer. compared: number of tokens at which the
    models are compared, over shared roots, if the teacher has a different tokenizer; None: all.
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
