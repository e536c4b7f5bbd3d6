"""Plain implementations of ULD and GOLD, two losses for a teacher with a different tokenizer.

Both compare the models' distributions at the beginning of each chunk. A chunk is the text between
neighboring places where both tokenizers begin a token. Position n - 1 predicts token n, the end of
a text is a chunk, and no chunk is left out.

ULD (Boizard et al., arXiv 2402.12030) compares sorted probabilities: Σ_i |p_(i) - q_(i)|, the
shorter vocabulary padded with zeros.

GOLD (huggingface.co/docs/trl, gold_trainer) multiplies the distribution at a chunk's first token by
the probabilities of the chunk's other tokens. It computes the Jensen-Shannon divergence on strings
that are tokens in both vocabularies, and ULD on the rest. The weights are the shared fraction of
the teacher's vocabulary, and one minus that fraction.

Shapes: G chunks, P supervised positions of a batch, V student tokens, W teacher tokens, M strings
that are tokens in both vocabularies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.signals import LMHead
from stillhouse.signals.lm_head import head_logits
from stillhouse.teachers.text_tokens import TextTokens

SMALLEST = 1e-8
"""GOLD clamps probabilities to at least this value."""


@dataclass(frozen=True)
class Side:
    """One model's view of a batch's chunks.

    hidden_PD: hidden states that predict a token. targets_P: the predicted tokens. first_G: rows
    that predict the chunks' first tokens. count_G: tokens of each chunk, in consecutive rows.
    """

    hidden_PD: Tensor
    targets_P: Tensor
    first_G: Tensor
    count_G: Tensor
    head: LMHead

    def first(self, chunks: slice) -> Tensor:
        """The distributions at the beginning of these chunks, [G, V]."""
        return head_logits(self.head, self.hidden_PD[self.first_G[chunks]]).softmax(-1)

    def merged(self, chunks: slice) -> Tensor:
        """`first` times the probabilities of the other tokens in each chunk, [G, V]."""
        begin_G, count_G = self.first_G[chunks], self.count_G[chunks]
        owner = torch.arange(len(begin_G)).repeat_interleave(count_G - 1)
        within = torch.arange(len(owner)) - (count_G - 1).cumsum(0).sub(count_G - 1)[owner]
        rows = begin_G[owner] + 1 + within
        first_GV = self.first(chunks)
        log_GV = head_logits(self.head, self.hidden_PD[rows]).log_softmax(-1)
        found = log_GV.gather(1, self.targets_P[rows, None])[:, 0]
        rest_G = torch.zeros_like(first_GV[:, 0]).index_add(0, owner, found)
        return first_GV * rest_G.exp()[:, None]


def uld(student: Side, teacher: Side, chunks: slice) -> Tensor:
    """Sum of the distances between sorted probabilities over all chunks."""
    with torch.no_grad():
        teacher_GW = teacher.first(chunks)
    return sorted_distance(student.first(chunks), teacher_GW)


def sorted_distance(student_GV: Tensor, teacher_GW: Tensor) -> Tensor:
    sorted_GV, sorted_GW = (
        each.sort(-1, descending=True).values for each in (student_GV, teacher_GW)
    )
    size = max(sorted_GV.shape[1], sorted_GW.shape[1])
    padded = [F.pad(each, (0, size - each.shape[1])) for each in (sorted_GV, sorted_GW)]
    return (padded[0] - padded[1]).abs().sum()


@dataclass(frozen=True)
class Gold:
    """GOLD. student_M, teacher_M: ids of the strings that are tokens in both vocabularies."""

    student_M: Tensor
    teacher_M: Tensor

    @classmethod
    def of(cls, student: TextTokens, teacher: TextTokens, ends: tuple[int, int]) -> Gold:
        """Match two vocabularies. ends: the corresponding end tokens (student, teacher)."""
        ids = {value: id for id, value in student.strings.items()}
        pairs = [(ids[value], id) for id, value in teacher.strings.items() if value in ids]
        student_M, teacher_M = torch.tensor([*pairs, ends]).T
        return cls(student_M, teacher_M)

    def __call__(self, student: Side, teacher: Side, chunks: slice) -> Tensor:
        """Sum of the distances over all chunks."""
        with torch.no_grad():
            teacher_GW = teacher.merged(chunks)
        return self.distance(student.merged(chunks), teacher_GW)

    def distance(self, student_GV: Tensor, teacher_GW: Tensor) -> Tensor:
        """Distance between merged distributions."""
        share = len(self.teacher_M) / teacher_GW.shape[1]
        q_GM, p_GM = student_GV[:, self.student_M], teacher_GW[:, self.teacher_M]
        alone_V, alone_W = (
            torch.ones(each.shape[1], dtype=torch.bool).index_fill(0, ids, False)
            for each, ids in ((student_GV, self.student_M), (teacher_GW, self.teacher_M))
        )
        rest = sorted_distance(student_GV[:, alone_V], teacher_GW[:, alone_W])
        return share * jensen_shannon(p_GM, q_GM) + (1 - share) * rest


def jensen_shannon(p_GM: Tensor, q_GM: Tensor) -> Tensor:
    log_p_GM, log_q_GM = (each.clamp_min(SMALLEST).log() for each in (p_GM, q_GM))
    log_m_GM = torch.logaddexp(log_p_GM, log_q_GM) - math.log(2.0)
    of_p, of_q = (each.exp() * (each - log_m_GM) for each in (log_p_GM, log_q_GM))
    return (of_p + of_q).sum() / 2
