"""Measure models one after another, the teacher first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from stillhouse.account import count_parameters
from stillhouse.data.shift import supervised_targets
from stillhouse.data.windows import WindowSet
from stillhouse.errors import ModelError
from stillhouse.evaluation.evaluate_config import EvaluateRecipe
from stillhouse.evaluation.fidelity import (
    HeldoutAnswers,
    compare,
    compare_folded,
    heldout_answers,
    heldout_batches,
)
from stillhouse.evaluation.generate import generate
from stillhouse.evaluation.kept_teacher import KeptTeacher
from stillhouse.evaluation.own_answers import OwnAnswers, far_on_own_text, with_head
from stillhouse.evaluation.results import Fidelity, Generation, ModelResult, ScoredAnswers
from stillhouse.launch import world_size
from stillhouse.processes import lost_process
from stillhouse.progress import bar
from stillhouse.shared_work import ALONE, Processes
from stillhouse.signals import LMHead
from stillhouse.teachers.aligned_text import AlignedBatch, Alignment, whole_text
from stillhouse.teachers.sharded_teacher import ShardedTeacher
from stillhouse.teachers.text_tokens import TextTokens

TEACHER = "teacher"


@dataclass
class Measuring:
    """Measures one model at a time, the teacher first: outputs on the windows, answers to the
    prompts, and size.

    tokenizer, vocabulary: the students', which are also the teacher's if there is no `alignment`.
    processes: share the windows.
    alignment: for a teacher with a different tokenizer.
    """

    section: EvaluateRecipe
    tokenizer: Any
    windows: WindowSet
    vocabulary: int
    seed: int
    processes: Processes = ALONE
    own_answers: OwnAnswers | None = None
    alignment: Alignment | None = None
    results: dict[str, ModelResult] = field(default_factory=dict)
    scored_answers: list[ScoredAnswers] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    _teacher: HeldoutAnswers | None = None

    @cached_property
    def _bytes(self) -> int | None:
        return supervised_bytes(self.tokenizer, self.windows)

    @cached_property
    def _aligned(self) -> list[AlignedBatch]:
        """This process's share of the windows in the teacher's tokens; empty if its tokens are the
        same."""
        if self.alignment is None:
            return []
        aligner, batches = self.alignment.aligner, heldout_batches(self.windows, self.processes)
        return [whole_text(aligner, batch) for batch in batches]

    def _fidelity(self, role: str, answers: HeldoutAnswers) -> Fidelity:
        if self._teacher is None:
            self._teacher = answers = answers.apart()
        size = self._bytes
        if self.alignment is None:
            found = compare(answers, self._teacher, self.vocabulary)
        elif role == TEACHER:
            tokens = self.alignment.aligner.teacher
            lengths_N = tokens.lengths_V[answers.targets_N.numpy()]
            size = sum(self.processes.collect(int(lengths_N.sum())))
            found = compare(answers, answers, tokens.size)
            places = sum(len(text.begins_T) for text in self._aligned)
            found = replace(found, compared=sum(self.processes.collect(places)))
        else:
            fold = self.alignment.roots.fold
            found = compare_folded(answers, self._teacher, self._aligned, fold)
        return replace(found, bits_per_byte=bits_per_byte(found, size))

    @property
    def teacher_answers(self) -> HeldoutAnswers:
        assert self._teacher is not None
        return self._teacher

    def add_kept(self, kept: KeptTeacher, head: LMHead) -> None:
        """Add the teacher's earlier measurements."""
        self._teacher = kept.answers(head, self.processes)
        self.results[TEACHER] = kept.result
        if kept.texts is not None:
            self.texts[TEACHER] = kept.texts

    def add(
        self, role: str, model: Any, bytes_on_disk: int, sharded: ShardedTeacher | None = None
    ) -> None:
        windows, count = self.windows, self.processes.count
        other = self.alignment.aligner if self.alignment and role == TEACHER else None
        tokens = sum(len(windows[index]["input_ids"]) for index in range(len(windows)))
        with lost_process(count), bar(f"Held-out: {role}", tokens) as advance:
            run = partial(
                heldout_answers,
                model,
                windows,
                advance=lambda tokens: advance(tokens * count),
                processes=self.processes,
                batches=[text.batch for text in self._aligned] if other else None,
            )
            answers = with_head(run, sharded)
            fidelity = self._fidelity(role, answers)
        size = count_parameters(model)
        self.results[role] = ModelResult(
            role=role,
            parameters=size.total,
            non_embedding_parameters=size.non_embedding,
            bytes_on_disk=bytes_on_disk,
            fidelity=fidelity,
        )
        if sharded is None and self.own_answers is not None and other is None:
            self.own_answers.add(role, model)
        if sharded is not None or not self.processes.leads:
            return
        self.texts[role] = generate(
            model,
            other.teacher.tokenizer if other else self.tokenizer,
            self.section.prompts,
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            seed=self.seed,
        )

    def score_own_text(self, load_teacher: Callable[[], tuple[Any, ShardedTeacher | None]]) -> None:
        """Score the answers with the teacher, once all models have answered."""
        if self.own_answers is None or not self.own_answers.answers:
            return
        with lost_process(world_size()):
            found, self.scored_answers = self.own_answers.scored(*load_teacher(), self.vocabulary)
        for role, own_text in found.items():
            self.results[role] = replace(self.results[role], own_text=own_text)

    @property
    def tokens(self) -> int:
        """Number of supervised tokens in the windows, in the students' tokenization."""
        return list(self.results.values())[-1].fidelity.tokens

    def folded_notes(self) -> list[str]:
        """A note on how models with different tokenizers are compared."""
        compared = [one.fidelity.compared for one in self.results.values() if one.fidelity.compared]
        if self.alignment is None or not compared:
            return []
        shared = self.alignment.roots.shared
        return [
            f"The teacher has a different tokenizer: KL and top-1 agreement are over {shared:,} "
            f"shared strings, at the {compared[0]:,} positions where both tokenizers begin a "
            "token. Perplexity, calibration error, and speed are for each model's own tokens; use "
            "bits per byte to compare models."
        ]

    def own_text_notes(self) -> list[str]:
        student = self.results.get("student")
        if self.own_answers is None or student is None or student.own_text is None:
            return []
        far = far_on_own_text(student.fidelity.kl, student.own_text)
        return [self.own_answers.note(student.own_text.answers), *far]

    def generations(self) -> list[Generation]:
        return [
            Generation(prompt, {role: texts[number] for role, texts in self.texts.items()})
            for number, prompt in enumerate(self.section.prompts)
        ]


def supervised_bytes(tokenizer: Any, windows: WindowSet) -> int | None:
    """Number of bytes in the supervised tokens, without special tokens; None if the tokenizer does
    not define its tokens' bytes."""
    try:
        lengths_V = TextTokens(tokenizer).lengths_V
    except ModelError:
        return None
    total = 0
    for index in range(len(windows)):
        targets_N = supervised_targets(windows[index]["labels"][None]).numpy()
        total += int(lengths_V[targets_N[targets_N < len(lengths_V)]].sum())
    return total


def bits_per_byte(fidelity: Fidelity, size: int | None) -> float | None:
    """The text's negative log-likelihood in bits, including ends of documents and turns, divided by
    its number of bytes."""
    return math.log2(fidelity.perplexity) * fidelity.tokens / size if size else None
