"""Measures a model on its own text: it answers prompts, and a teacher scores the answers.

A student that was trained on fixed text has never seen its own mistakes in a prefix, so it can be
close to its teacher on data but far from it on text that it generates.

Shapes: N tokens of answers, R answers in a forward pass, L tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.data.batches import Batch, positions_of
from stillhouse.data.shift import IGNORED, supervised_rows
from stillhouse.generation.generator import Generator, TokenPrompt
from stillhouse.generation.own_text_figures import OwnText
from stillhouse.signals import DenseSignal, Fold, LMHead
from stillhouse.signals.lm_head import (
    folded_log_probabilities,
    kl_of_rows,
    log_probabilities,
    row_chunks,
)
from stillhouse.teachers.backbone import float32_head, hidden_states, lm_head

NGRAM = 4
"""Length of the n-grams whose repetition is counted."""
FAR = 3.0
"""Ratio of the KL on own text to the KL on data from which the user is told."""
ANSWERS_PER_FORWARD = 8


@dataclass(frozen=True)
class OwnAnswer:
    """An answer as token ids, because decoding and tokenizing it again can change the sequence.

    ids: the answer, including the token that ends it. ended: False if it was cut off.
    """

    prompt: Sequence[int]
    ids: Sequence[int]
    ended: bool


class TokenScores(NamedTuple):
    """Scores of each token of the answers, in nats, for the next-token distributions at
    temperature 1.

    forward_kl_N: KL(teacher ‖ model). reverse_kl_N: KL(model ‖ teacher). entropy_N: the model's
    entropy. teacher_logprob_N: the token's log-probability under the teacher.
    If the teacher has a different tokenizer, all scores except the entropy are over shared roots,
    and NaN at tokens that do not begin where a token of the teacher does.
    """

    forward_kl_N: Tensor
    reverse_kl_N: Tensor
    entropy_N: Tensor
    teacher_logprob_N: Tensor


def write_answers(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    advance: Callable[[int], object] = lambda answers: None,
) -> list[OwnAnswer]:
    """Generate answers to prompts (token ids), in order.

    An answer has at most `max_tokens` tokens, or fewer if prompt and answer would exceed the
    model's window; prompts that leave no room are skipped. seeds: one per prompt; by default, its
    index. advance: called after each answer.
    """
    room = [
        min(max_tokens, generator.window - len(prompt)) if generator.window else max_tokens
        for prompt in prompts
    ]
    asked = [
        TokenPrompt(prompt, most, temperature, seed=seeds[number] if seeds else number)
        for number, (prompt, most) in enumerate(zip(prompts, room, strict=True))
        if most > 0 and len(prompt)
    ]
    found: dict[int, OwnAnswer] = {}
    for number, written in generator.generate(asked):
        prompt = asked[number].ids
        found[number] = OwnAnswer(prompt, list(written.ids), written.stop == "stop")
        advance(1)
    return [found[number] for number in sorted(found)]


@torch.no_grad()
def answer_states(
    model: nn.Module,
    answers: Sequence[OwnAnswer],
    *,
    head: LMHead | None = None,
    passes: int | None = None,
    batches: Sequence[Batch] | None = None,
) -> DenseSignal:
    """Compute the hidden states that predict each token of the answers, in order, on the CPU.

    model: in eval mode. head: the model's LM head, if the model is sharded. passes: number of
    forward passes, for a sharded model, which every process must run equally often; by default, as
    many as the answers need. batches: the `answer_batches` in the model's tokens, if its tokenizer
    is different. No logits are computed.
    """
    device = next(model.parameters()).device
    head = head or lm_head(model)
    rows = [torch.empty(0, head.weight_VD.shape[1], dtype=head.weight_VD.dtype)]
    batches = list(answer_batches(answers)) if batches is None else batches
    for number in range(len(batches) if passes is None else passes):
        batch = batches[number] if number < len(batches) else _NOTHING
        hidden_RLD = hidden_states(
            model, batch["input_ids"].to(device), batch["position_ids"].to(device)
        )
        rows.append(supervised_rows(hidden_RLD.cpu(), positions_of(batch)))
    return DenseSignal(torch.cat(rows[1:] or rows), head)


def answer_batches(answers: Sequence[OwnAnswer]) -> Iterator[Batch]:
    """Yield batches of prompts with their answers, whose tokens are the labels.

    Rows are padded on the right, where no other token attends to the padding.
    """
    for start in range(0, len(answers), ANSWERS_PER_FORWARD):
        some = answers[start : start + ANSWERS_PER_FORWARD]
        longest = max(len(one.prompt) + len(one.ids) for one in some)
        ids_RL = torch.zeros(len(some), longest, dtype=torch.long)
        labels_RL = torch.full_like(ids_RL, IGNORED)
        for row, one in enumerate(some):
            first, last = len(one.prompt), len(one.prompt) + len(one.ids)
            ids_RL[row, :last] = torch.tensor([*one.prompt, *one.ids])
            labels_RL[row, first:last] = ids_RL[row, first:last]
        positions_RL = torch.arange(longest).expand(len(some), -1)
        yield {"input_ids": ids_RL, "labels": labels_RL, "position_ids": positions_RL}


def without_padding(batch: Batch) -> Batch:
    """Make each token after a row's answer a separate document."""
    labels_RL, positions_RL = batch["labels"], batch["position_ids"].clone()
    later_RL = (labels_RL != IGNORED).flip(1).cumsum(1).flip(1)
    positions_RL[later_RL == 0] = 0
    return {**batch, "position_ids": positions_RL}


_ZERO = torch.zeros(1, 1, dtype=torch.long)
_NOTHING: Batch = {
    "input_ids": _ZERO,
    "labels": torch.full_like(_ZERO, IGNORED),
    "position_ids": _ZERO,
}


@torch.no_grad()
def score_tokens(
    answers: Sequence[OwnAnswer], model: DenseSignal, teacher: DenseSignal, vocabulary: int
) -> TokenScores:
    """Compare both models at every token of the answers.

    model, teacher: `answer_states` of the same answers. vocabulary: distributions are over this
    many first tokens. Logits are computed for a few rows at a time, in float32.
    """
    targets_N = torch.tensor([token for one in answers for token in one.ids], dtype=torch.long)
    assert len(targets_N) == len(model.hidden_ND) == len(teacher.hidden_ND), "other answers"
    teacher_head = float32_head(teacher.head, vocabulary)
    model_head = teacher_head if model is teacher else float32_head(model.head, vocabulary)
    scores = TokenScores(*(torch.empty(len(targets_N)) for _ in range(4)))
    for chunk in row_chunks(model_head, len(targets_N)):
        theirs_NV = _log_probabilities(teacher, teacher_head, chunk)
        own_NV = theirs_NV if model is teacher else _log_probabilities(model, model_head, chunk)
        found = score_rows(own_NV.to(theirs_NV.device), theirs_NV, targets_N[chunk])
        for column_N, values_n in zip(scores, found, strict=True):
            column_N[chunk] = values_n.cpu()
    return scores


@torch.no_grad()
def score_folded_tokens(
    answers: Sequence[OwnAnswer],
    model: DenseSignal,
    teacher: DenseSignal,
    covered_N: Tensor,
    fold: Fold,
) -> TokenScores:
    """Like `score_tokens`, for a teacher with a different tokenizer.

    teacher: has a row for each token where `covered_N` is True, i.e. both tokenizers begin a token.
    """
    targets_N = torch.tensor([token for one in answers for token in one.ids], dtype=torch.long)
    assert len(targets_N) == len(model.hidden_ND) == len(covered_N), "other answers"
    teacher_head = float32_head(teacher.head, len(fold.teacher_W))
    model_head = float32_head(model.head, len(fold.student_V))
    row_N = covered_N.cumsum(0) - 1
    scores = TokenScores(*(torch.full((len(targets_N),), math.nan) for _ in range(4)))
    for chunk in row_chunks(teacher_head, len(targets_N)):
        own_NV = _log_probabilities(model, model_head, chunk)
        scores.entropy_N[chunk] = entropy_of_rows(own_NV).cpu()
        here_N = covered_N[chunk]
        if not here_N.any():
            continue
        theirs_NW = _log_probabilities(teacher, teacher_head, row_N[chunk][here_N])
        found = score_rows(
            folded_log_probabilities(own_NV[here_N.to(own_NV.device)], fold.student_V, fold.roots),
            folded_log_probabilities(theirs_NW, fold.teacher_W, fold.roots).to(own_NV.device),
            fold.student_V[targets_N[chunk][here_N]],
        )
        for column_N, values_n in (
            (scores.forward_kl_N, found.forward_kl_N),
            (scores.reverse_kl_N, found.reverse_kl_N),
            (scores.teacher_logprob_N, found.teacher_logprob_N),
        ):
            column_N[chunk][here_N] = values_n.cpu()
    return scores


def score_rows(own_NV: Tensor, theirs_NV: Tensor, targets_N: Tensor) -> TokenScores:
    """Compute scores from the model's and the teacher's log-probabilities before each token."""
    targets_N = targets_N.to(theirs_NV.device)
    return TokenScores(
        forward_kl_N=kl_of_rows(theirs_NV, own_NV),
        reverse_kl_N=kl_of_rows(own_NV, theirs_NV),
        entropy_N=entropy_of_rows(own_NV),
        teacher_logprob_N=theirs_NV.gather(-1, targets_N[:, None])[:, 0],
    )


def entropy_of_rows(log_p_NV: Tensor) -> Tensor:
    """The entropy of each row, in nats: [N]."""
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def _log_probabilities(states: DenseSignal, head: LMHead, rows: slice | Tensor) -> Tensor:
    return log_probabilities(head, states.hidden_ND[rows].to(head.weight_VD.device))


def own_text_sums(answers: Sequence[OwnAnswer], scores: TokenScores) -> Tensor:
    """The float64 sums that `own_text` turns into means; they can be added over processes."""
    sums = [float(column_N.double().nansum()) for column_N in scores]
    ngrams = [repeated_ngrams(one.ids) for one in answers]
    counts = [
        int((~scores.forward_kl_N.isnan()).sum()),
        sum(len(one.ids) for one in answers),
        len(answers),
        sum(not one.ended for one in answers),
        sum(repeated for repeated, _ in ngrams),
        sum(total for _, total in ngrams),
    ]
    return torch.tensor([*sums, *counts], dtype=torch.float64)


def own_text(sums: Tensor) -> OwnText | None:
    """Compute the means from `own_text_sums`; None if there is nothing to compare."""
    *totals, compared, tokens, answers, cut_off, repeated, grams = sums.tolist()
    if not compared:
        return None
    forward, reverse, entropy, logprob = totals
    return OwnText(
        forward_kl=forward / compared,
        reverse_kl=reverse / compared,
        entropy=entropy / tokens,
        teacher_logprob=logprob / compared,
        length=tokens / answers,
        cut_off=cut_off / answers,
        repetition=repeated / max(1, grams),
        answers=int(answers),
        tokens=int(tokens),
        compared=None if compared == tokens else int(compared),
    )


def repeated_ngrams(ids: Sequence[int]) -> tuple[int, int]:
    """The number of 4-grams that occur earlier in the same answer, and of all its 4-grams."""
    grams = list(zip(*(ids[start:] for start in range(NGRAM)), strict=False))
    return len(grams) - len(set(grams)), len(grams)


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, they are the decoded text with special tokens.

    A character that several tokens encode belongs to the last of them; the others are empty.
    """
    texts: list[str] = []
    start = shown = 0  # decode from `start`; the tokens before `shown` are already in `texts`
    for end in range(1, len(ids) + 1):
        before, now = (_decode(tokenizer, ids[start:stop]) for stop in (shown, end))
        if now.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, shown = shown, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
