"""Roots: the events that a student's and a teacher's different vocabularies share.

A byte string that is a token of both vocabularies is a root. Any other token belongs to the root of
the first token with which the other tokenizer encodes its bytes: a teacher's "123" belongs to "1"
if the student's tokenizer splits digits. Every token has a root, so the probabilities of the roots
sum to 1 under both models and nothing is renormalized.

Where both tokenizers begin a token at the same byte of a text, their two tokens are one event. If
training text shows that their roots differ, as those of "\n" and "\n\n" can, the roots are merged
(`merged`). Otherwise the student would learn tokens that its tokenizer never produces there.

Shapes: V student tokens, W teacher tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stillhouse.errors import ModelError
from stillhouse.signals import Fold
from stillhouse.teachers.text_tokens import Ids, TextTokens


@dataclass(frozen=True)
class Roots:
    """The root of each token of two vocabularies.

    student_V, teacher_W: the root of each token id, in [0, count). count: number of roots. shared:
    number of strings that both vocabularies have. merges: (student's token, teacher's token, count
    in the text) of each pair whose roots were merged.
    """

    student_V: Ids
    teacher_W: Ids
    count: int
    shared: int
    merges: tuple[tuple[int, int, int], ...] = ()

    @property
    def events(self) -> int:
        """The number of roots, plus one for "not covered"."""
        return self.count + 1

    @property
    def fold(self) -> Fold:
        return Fold(torch.from_numpy(self.student_V), torch.from_numpy(self.teacher_W), self.count)


def make_roots(
    student: TextTokens, teacher: TextTokens, partners: Sequence[tuple[int, int]]
) -> Roots:
    """The roots before any text is seen.

    partners: pairs (student, teacher) of special tokens that mean the same, the end of text first.
    A token can be in several pairs.
    Every root has tokens of both vocabularies. Special tokens and unused ids without a partner
    share a root or, if only one vocabulary has any, belong to the end of text.
    Raises ModelError if that is needed and there are no partners.
    """
    root_of: dict[bytes, int] = {}
    for value in student.strings.values():
        root_of.setdefault(value, -1)
    known_to_teacher = set(teacher.strings.values())
    shared = [value for value in root_of if value in known_to_teacher]
    root_of = {value: root for root, value in enumerate(shared)}
    ends = _together(partners)
    other = len(shared) + len(set(ends.values()))
    first = {
        **_first_tokens([v for v in teacher.strings.values() if v not in root_of], student),
        **_first_tokens([v for v in student.strings.values() if v not in root_of], teacher),
    }

    def root(value: bytes) -> int:
        # Each step leads to a proper prefix.
        while value not in root_of:
            if value not in first:
                return other
            value = first[value]
        return root_of[value]

    student_V, teacher_W = (np.full(side.size, other) for side in (student, teacher))
    for side, roots_X in ((student, student_V), (teacher, teacher_W)):
        for id, value in side.strings.items():
            roots_X[id] = root(value)
    for (ours, theirs), place in ends.items():
        student_V[ours] = teacher_W[theirs] = len(shared) + place
    alone = [bool((roots_X == other).any()) for roots_X in (student_V, teacher_W)]
    if all(alone):
        return Roots(student_V, teacher_W, other + 1, len(shared))
    if any(alone) and not partners:
        raise ModelError(
            "one tokenizer has special tokens and the other has none",
            where=f"the tokenizers of {student.name} and {teacher.name}",
            fix="use models whose tokenizers have an end-of-text token",
        )
    for roots_X in (student_V, teacher_W):
        roots_X[roots_X == other] = len(shared)
    return Roots(student_V, teacher_W, other, len(shared))


def _together(pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Number the pairs from 0, with the same number for pairs that have a token in common."""
    parent = list(range(len(pairs)))
    for number, (ours, theirs) in enumerate(pairs):
        for before, (left, right) in enumerate(pairs[:number]):
            if ours == left or theirs == right:
                least = min(parent[before], parent[number])
                replaced = {parent[before], parent[number]}
                parent = [least if each in replaced else each for each in parent]
    numbers = {each: place for place, each in enumerate(dict.fromkeys(parent))}
    return {pair: numbers[each] for pair, each in zip(pairs, parent, strict=True)}


def _first_tokens(values: Iterable[bytes], tokens: TextTokens) -> dict[bytes, bytes]:
    """The first token with which a tokenizer encodes each string, as bytes.

    Strings that are not UTF-8, or that the tokenizer prefixes (with a space, for example), get the
    longest token that they begin with. A string that begins with no token is left out.
    """
    known, longest = set(tokens.strings.values()), int(tokens.lengths_V.max(initial=0))
    texts: dict[bytes, str] = {}
    found: dict[bytes, bytes] = {}
    for value in dict.fromkeys(values):
        try:
            texts[value] = value.decode()
        except UnicodeDecodeError:
            found[value] = b""
    for value, ids in zip(texts, tokens.encode(list(texts.values())), strict=True):
        found[value] = tokens.strings.get(int(ids[0]), b"") if len(ids) else b""
    for value, piece in found.items():
        if not piece or not value.startswith(piece):
            sizes = range(min(len(value), longest), 0, -1)
            found[value] = next((value[:n] for n in sizes if value[:n] in known), b"")
    return {value: piece for value, piece in found.items() if piece and piece != value}


def merged(roots: Roots, observed: Mapping[tuple[int, int], int]) -> Roots:
    """Merge the roots of pairs (student, teacher) of tokens that were observed at the same place.

    observed: the pairs with their counts.
    """
    parent = np.arange(roots.count)

    def find(root: int) -> int:
        while parent[root] != root:
            parent[root] = parent[parent[root]]
            root = int(parent[root])
        return root

    merges = []
    for (ours, theirs), count in sorted(observed.items(), key=lambda item: (-item[1], item[0])):
        a, b = find(int(roots.student_V[ours])), find(int(roots.teacher_W[theirs]))
        if a != b:
            parent[max(a, b)] = min(a, b)
            merges.append((ours, theirs, count))
    if not merges:
        return roots
    ends = np.array([find(root) for root in range(roots.count)])
    kept, compact = np.unique(ends, return_inverse=True)
    return Roots(
        compact[roots.student_V],
        compact[roots.teacher_W],
        len(kept),
        roots.shared,
        (*roots.merges, *merges),
    )
