"""Properties of aligning any two byte-level BPE tokenizers, with random merges and texts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import DenseSignal, FoldedSignal, LMHead
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.roots import Roots, merged
from stillhouse.teachers.text_tokens import TextTokens

LETTERS = "abc"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PICKS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12)
TEXTS = st.text(st.sampled_from("aabbcc \n1漢"), min_size=1, max_size=30)


def tokenizer(picks: list[tuple[int, int]], order: int = 0) -> Any:
    """BPE with merges of the tokens picked by number. order: the seed for the order of ids."""
    pieces, merges = ["Ġ", *LETTERS], []
    for first, second in picks:
        left = pieces[first % len(pieces)]
        right = pieces[1:][second % (len(pieces) - 1)]
        if left + right not in pieces and "Ġ" not in right:
            merges.append((left, right))
            pieces.append(left + right)
    tokens = ["<|end|>", *BYTES, *pieces[1 + len(LETTERS) :]]
    ids = np.random.default_rng(order).permutation(len(tokens)).tolist()
    core = Tokenizer(models.BPE(dict(zip(tokens, ids, strict=True)), merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


PAIRS = st.builds(
    lambda ours, theirs: TokenAligner(tokenizer(ours, 1), tokenizer(theirs, 2)), PICKS, PICKS
)


def ends(tokens: TextTokens, ids: Any) -> list[int]:
    return np.cumsum([len(tokens.strings[int(id)]) for id in ids]).tolist()


@settings(deadline=None, max_examples=20)
@given(PAIRS, TEXTS)
def test_boundaries_are_shared_where_both_have_the_same_number_of_bytes(
    aligner: TokenAligner, text: str
) -> None:
    (ids,), (others,) = aligner.student.encode([text]), aligner.teacher.encode([text])
    (found,) = aligner.align(ids[None], np.arange(len(ids))[None], ids[None])
    assert found.ids_M.tolist() == others.tolist() or len(ids) == 1
    places = {end: at + 1 for at, end in enumerate(ends(aligner.teacher, others))}
    expected = [places.get(end, -1) for end in [0, *ends(aligner.student, ids)][:-1]]
    if len(ids) > 1:
        assert found.begins_L.tolist() == expected


@settings(deadline=None, max_examples=20)
@given(PAIRS, st.integers(0, 1000))
def test_roots_partition_both_vocabularies_and_are_prefixes_of_their_tokens(
    aligner: TokenAligner, seed: int
) -> None:
    roots = aligner.roots()
    common = set(aligner.student.strings.values()) & set(aligner.teacher.strings.values())
    strings = {
        int(roots.student_V[id]): value
        for id, value in aligner.student.strings.items()
        if value in common
    }
    g = torch.Generator().manual_seed(seed)
    for tokens, roots_X in (
        (aligner.student, roots.student_V),
        (aligner.teacher, roots.teacher_W),
    ):
        assert all(v.startswith(strings[int(roots_X[id])]) for id, v in tokens.strings.items())
        assert set(roots_X.tolist()) == set(range(roots.count))
        p_X = torch.randn(len(roots_X), generator=g, dtype=torch.float64).softmax(0)
        sums_R = torch.zeros(roots.count, dtype=torch.float64)
        sums_R.index_add_(0, torch.from_numpy(roots_X), p_X)
        assert float(sums_R.sum()) == pytest.approx(1, abs=1e-12)


def head_of(p_X: Tensor) -> LMHead:
    """A head that returns these probabilities for a hidden state of 1."""
    return LMHead(p_X.clamp_min(1e-300).log()[:, None].clone().requires_grad_())


def loss_of(q_V: Tensor, p_W: Tensor, roots: Roots) -> tuple[float, Tensor]:
    """The folded forward KL of one row, and its gradient with respect to the student's logits."""
    one = torch.ones(1, 1, dtype=torch.float64)
    signal = FoldedSignal(DenseSignal(one, head_of(p_W)), roots.fold, torch.tensor([True]))
    head = head_of(q_V)
    total = fused_loss(one, head, [Term("forward_kl")], signal=signal).total
    (gradient_V1,) = torch.autograd.grad(total, [head.weight_VD])
    return float(total.detach()), gradient_V1[:, 0]


@settings(deadline=None, max_examples=20)
@given(PICKS, st.integers(0, 1000))
def test_with_the_same_tokens_the_loss_is_forward_kl(
    picks: list[tuple[int, int]], seed: int
) -> None:
    """The order of the ids differs."""
    aligner = TokenAligner(tokenizer(picks, 1), tokenizer(picks, 2))
    g = torch.Generator().manual_seed(seed)
    size = aligner.student.size
    q_V, p_V = (torch.randn(size, generator=g, dtype=torch.float64).softmax(0) for _ in range(2))
    order = list(aligner.student.tokenizer.get_vocab().items())
    other = aligner.teacher.tokenizer.get_vocab()
    p_W = torch.empty_like(p_V)
    p_W[[other[name] for name, _ in order]] = p_V[[id for _, id in order]]
    found, gradient_V = loss_of(q_V, p_W, aligner.roots())
    assert found == pytest.approx(float((p_V * (p_V / q_V).log()).sum()), abs=1e-10)
    torch.testing.assert_close(gradient_V, q_V - p_V, rtol=0, atol=1e-10)


def markov_words(seed: int, longest: int = 4) -> dict[str, float]:
    """All words of a random Markov chain over letters, with a leading space, and their
    probabilities. The chain ends a word at random, at the latest at `longest` letters."""
    chance = np.random.default_rng(seed)
    first = chance.dirichlet(np.ones(len(LETTERS)))
    after = chance.dirichlet(np.ones(len(LETTERS) + 1), len(LETTERS))  # the last is the end
    words = {}
    for length in range(1, longest + 1):
        for letters in itertools.product(range(len(LETTERS)), repeat=length):
            share = first[letters[0]]
            for one, following in itertools.pairwise(letters):
                share *= after[one, following]
            if length < longest:
                share *= after[letters[-1], -1]
            words[" " + "".join(LETTERS[i] for i in letters)] = float(share)
    return words


def exact(tokens: TextTokens, words: dict[str, float], place: int = 0) -> Tensor:
    """An exact model of the source: the distribution of the token at one place of a word."""
    p_X = torch.zeros(tokens.size, dtype=torch.float64)
    for ids, share in zip(tokens.encode(list(words)), words.values(), strict=True):
        id = int(ids[place]) if len(ids) > place else tokens.tokenizer.eos_token_id
        p_X[id] += share
    return p_X


def roots_after_text(aligner: TokenAligner, words: dict[str, float]) -> Roots:
    """The roots, merged as after aligning text that contains every word."""
    pairs = zip(
        aligner.student.encode(list(words)), aligner.teacher.encode(list(words)), strict=True
    )
    return merged(aligner.roots(), {(int(s[0]), int(t[0])): 1 for s, t in pairs})


@settings(deadline=None, max_examples=25)
@given(PAIRS, st.integers(0, 1000))
def test_exact_models_of_the_same_source_have_no_loss_at_word_starts(
    aligner: TokenAligner, seed: int
) -> None:
    words = markov_words(seed)
    roots = roots_after_text(aligner, words)
    q_V, p_W = exact(aligner.student, words), exact(aligner.teacher, words)
    found, _ = loss_of(q_V, p_W, roots)
    assert found == pytest.approx(0, abs=1e-10)


@settings(deadline=None, max_examples=25)
@given(PAIRS, st.integers(0, 1000))
def test_models_of_another_source_or_one_position_off_have_a_loss(
    aligner: TokenAligner, seed: int
) -> None:
    words = markov_words(seed)
    roots = roots_after_text(aligner, words)
    q_V, p_W = exact(aligner.student, words), exact(aligner.teacher, words)
    starts = {int(roots.student_V[id]) for id in q_V.nonzero()[:, 0].tolist()}
    if len(starts) == 1:
        return  # all words begin with the same root
    changed = {word: share * (1 + (n % 3)) for n, (word, share) in enumerate(words.items())}
    total = sum(changed.values())
    other_V = exact(aligner.student, {word: share / total for word, share in changed.items()})
    folded = [
        torch.zeros(roots.count, dtype=torch.float64).index_add(
            0, torch.from_numpy(roots.student_V), each_V
        )
        for each_V in (q_V, other_V)
    ]
    if float((folded[0] - folded[1]).abs().max()) > 1e-3:
        assert loss_of(other_V, p_W, roots)[0] > 1e-8
    # A reader that is one position off predicts a word's second token instead of its first.
    off, _ = loss_of(q_V, exact(aligner.teacher, words, place=1), roots)
    assert off > 1e-3
