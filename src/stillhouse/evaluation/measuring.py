"""Measures models one after the other, the teacher first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from stillhouse.account import count_parameters
from stillhouse.data.windows import WindowSet
from stillhouse.evaluation.evaluate_config import EvaluateRecipe
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.evaluation.generate import generate
from stillhouse.evaluation.kept_teacher import KeptTeacher
from stillhouse.evaluation.own_answers import OwnAnswers, far_on_own_text
from stillhouse.evaluation.results import Generation, ModelResult, ScoredAnswers
from stillhouse.evaluation.text_bytes import bits_per_byte, supervised_bytes
from stillhouse.launch import world_size
from stillhouse.processes import lost_process
from stillhouse.progress import bar
from stillhouse.shared_work import ALONE, Processes
from stillhouse.signals import DenseSignal, LMHead
from stillhouse.teachers.sharded_teacher import ShardedTeacher

TEACHER = "teacher"


@dataclass
class Measuring:
    """Measures one model at a time, teacher first: its outputs for the windows and the prompts,
    and its size. processes: those that divide the windows."""

    section: EvaluateRecipe
    tokenizer: Any
    windows: WindowSet
    vocabulary: int
    seed: int
    processes: Processes = ALONE
    own_answers: OwnAnswers | None = None
    results: dict[str, ModelResult] = field(default_factory=dict)
    scored_answers: list[ScoredAnswers] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    _teacher: HeldoutAnswers | None = None

    @cached_property
    def _bytes(self) -> int | None:
        return supervised_bytes(self.tokenizer, self.windows)

    @property
    def teacher_answers(self) -> HeldoutAnswers:
        assert self._teacher is not None
        return self._teacher

    def add_kept(self, kept: KeptTeacher, head: LMHead) -> None:
        """The teacher as it was measured before."""
        self._teacher = kept.answers(head, self.processes)
        self.results[TEACHER] = kept.result
        if kept.texts is not None:
            self.texts[TEACHER] = kept.texts

    def add(
        self, role: str, model: Any, bytes_on_disk: int, sharded: ShardedTeacher | None = None
    ) -> None:
        windows, count = self.windows, self.processes.count
        tokens = sum(len(windows[index]["input_ids"]) for index in range(len(windows)))
        with lost_process(count), bar(f"Held-out: {role}", tokens) as advance:
            run = partial(
                heldout_answers,
                model,
                windows,
                advance=lambda tokens: advance(tokens * count),
                processes=self.processes,
            )
            answers = run() if sharded is None else sharded.gathered(lambda head: run(head=head))
            self._teacher = self._teacher or answers
            fidelity = compare(answers, self._teacher, self.vocabulary)
        fidelity = replace(fidelity, bits_per_byte=bits_per_byte(fidelity, self._bytes))
        size = count_parameters(model)
        self.results[role] = ModelResult(
            role=role,
            parameters=size.total,
            non_embedding_parameters=size.non_embedding,
            bytes_on_disk=bytes_on_disk,
            fidelity=fidelity,
        )
        if sharded is None and self.own_answers is not None:
            self.own_answers.add(role, model)
        if sharded is not None or not self.processes.leads:
            return
        self.texts[role] = generate(
            model,
            self.tokenizer,
            self.section.prompts,
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            seed=self.seed,
        )

    def score_own_text(self, load_teacher: Callable[[], tuple[Any, ShardedTeacher | None]]) -> None:
        """Once all models have answered: the teacher scores the answers."""
        if self.own_answers is None or not self.own_answers.answers:
            return
        with lost_process(world_size()):
            model, sharded = load_teacher()

            def run_teacher(work: Callable[[Any, LMHead | None], DenseSignal]) -> DenseSignal:
                if sharded is None:
                    return work(model, None)
                return sharded.gathered(lambda head: work(model, head))

            found, self.scored_answers = self.own_answers.scored(run_teacher, self.vocabulary)
        for role, own_text in found.items():
            self.results[role] = replace(self.results[role], own_text=own_text)

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
