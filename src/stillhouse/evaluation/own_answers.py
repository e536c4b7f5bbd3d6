"""Measure models on their own answers: each model answers the same prompts, and the teacher scores
all answers at the end.

Under torchrun, the processes share the prompts, and the results are for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isnan
from typing import Any, TypeVar

import torch

from stillhouse.data.turn_end import end_of_answers
from stillhouse.data.window_prompts import window_prompts
from stillhouse.data.windows import WindowSet
from stillhouse.evaluation.evaluate_config import OwnTextRecipe
from stillhouse.evaluation.generate import prompt_ids
from stillhouse.evaluation.results import ScoredAnswer, ScoredAnswers
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.own_text import (
    ANSWERS_PER_FORWARD,
    FAR,
    OwnAnswer,
    TokenScores,
    answer_batches,
    answer_states,
    own_text,
    own_text_sums,
    score_folded_tokens,
    score_tokens,
    token_texts,
    without_padding,
    write_answers,
)
from stillhouse.generation.own_text_figures import OwnText
from stillhouse.launch import process_index, world_size
from stillhouse.processes import sum_over_processes
from stillhouse.progress import bar
from stillhouse.signals import DenseSignal
from stillhouse.teachers.aligned_text import AlignedBatch, Alignment, rewritten
from stillhouse.teachers.sharded_teacher import ShardedTeacher

EXAMPLES = 3
"""Number of prompts whose answers are kept token by token."""

T = TypeVar("T")


@dataclass
class OwnAnswers:
    """The models' answers to `prompts` (token ids), scored once all models have answered.

    Until then, each model's hidden states and head are kept on the CPU.

    alignment: for a teacher with a different tokenizer, which only scores the others' answers.
    """

    section: OwnTextRecipe
    tokenizer: Any
    prompts: list[list[int]]
    seed: int
    alignment: Alignment | None = None
    answers: dict[str, list[OwnAnswer]] = field(default_factory=dict)
    _states: dict[str, DenseSignal] = field(default_factory=dict)

    @classmethod
    def planned(
        cls,
        section: OwnTextRecipe | None,
        tokenizer: Any,
        windows: WindowSet,
        seed: int,
        alignment: Alignment | None = None,
    ) -> OwnAnswers | None:
        """Take the prompts from the section or from held-out windows; None if there is nothing to
        measure."""
        if section is None or not section.answers:
            return None
        given = [prompt_ids(tokenizer, prompt) for prompt in section.prompts]
        prompts = given or window_prompts(windows, section.answers)
        return cls(section, tokenizer, prompts, seed, alignment) if prompts else None

    def add(self, role: str, model: Any) -> None:
        """Let the model answer this process's share of the prompts."""
        generator = LocalGenerator(model, end_of_answers(self.tokenizer, model.generation_config))
        own = range(process_index(), len(self.prompts), world_size())
        with bar(f"Own text: {role}", len(own), unit="answers") as advance:
            answers = write_answers(
                generator,
                [self.prompts[number] for number in own],
                max_tokens=self.section.max_tokens,
                temperature=self.section.temperature,
                seeds=[self.seed + number for number in own],
                advance=advance,
            )
        states = answer_states(model, answers)
        head = states.head.to(states.hidden_ND.device).apart()
        self.answers[role], self._states[role] = answers, replace(states, head=head)

    def scored(
        self, teacher: Any, sharded: ShardedTeacher | None, vocabulary: int
    ) -> tuple[dict[str, OwnText], list[ScoredAnswers]]:
        """Score all answers. Return the results of every role, and this process's examples.

        sharded: set if the teacher's weights are sharded.
        """
        passes = -(-len(self.prompts) // (world_size() * ANSWERS_PER_FORWARD))
        figures, scores = {}, {}
        for role, answers in self.answers.items():
            aligned = self._aligned(answers)
            batches = [each.batch for each in aligned] if self.alignment else None
            run = partial(answer_states, teacher, answers, passes=passes, batches=batches)
            theirs = with_head(run, sharded)
            own = self._states.pop(role)
            own = replace(own, head=own.head.to(theirs.head.weight_VD.device))
            if self.alignment is None:
                scores[role] = score_tokens(answers, own, theirs, vocabulary)
            else:
                covered_N = torch.cat([torch.zeros(0).bool(), *(one.covered_N for one in aligned)])
                fold = self.alignment.roots.fold
                scores[role] = score_folded_tokens(answers, own, theirs, covered_N, fold)
            found = own_text(sum_over_processes(own_text_sums(answers, scores[role])))
            if found is not None:
                figures[role] = found
        return figures, self._examples(scores)

    def _aligned(self, answers: Sequence[OwnAnswer]) -> list[AlignedBatch]:
        """The answers in the teacher's tokens; empty if its tokens are the same."""
        if self.alignment is None:
            return []
        aligner = self.alignment.aligner
        batches = map(without_padding, answer_batches(answers))
        return [rewritten(aligner, batch, skip_unreadable=True) for batch in batches]

    def _examples(self, scores: dict[str, TokenScores]) -> list[ScoredAnswers]:
        """The first prompts that every model has answered. A model with a shorter context can have
        left some out."""
        by_prompt: dict[tuple[int, ...], dict[str, ScoredAnswer]] = {}
        for role, answers in self.answers.items():
            end = 0
            for answer in answers:
                tokens = slice(end, end + len(answer.ids))
                end = tokens.stop
                found = by_prompt.setdefault(tuple(answer.prompt), {})
                found[role] = _scored_answer(self.tokenizer, answer, scores[role], tokens)
        complete = [(p, found) for p, found in by_prompt.items() if len(found) == len(scores)]
        return [
            ScoredAnswers("".join(token_texts(self.tokenizer, prompt)), found)
            for prompt, found in complete[:EXAMPLES]
        ]

    def note(self, answered: int) -> str:
        """A note on how own text was measured. answered: number of prompts that were answered; the
        others fill the context."""
        asked = "" if self.section.prompts else " from the held-out text"
        temperature = self.section.temperature
        decoding = f"temperature {temperature:g}" if temperature else "greedy"
        left = len(self.prompts) - answered
        skipped = f" {left:,} more left out because they fill the context." if left else ""
        apart = ""
        if self.alignment is not None:
            apart = (
                " The teacher, which has a different tokenizer, only scores the others' answers."
            )
        prompts = f"{answered:,} prompt{'' if answered == 1 else 's'}{asked}"
        return (
            f"Own text: every model's answers to {prompts}, at most "
            f"{self.section.max_tokens:,} tokens each, {decoding}.{skipped}{apart}"
        )


def with_head(run: Callable[..., T], sharded: ShardedTeacher | None) -> T:
    """Call `run`, with the gathered head as `head` if the teacher is sharded."""
    return run() if sharded is None else sharded.gathered(lambda head: run(head=head))


def _scored_answer(
    tokenizer: Any, answer: OwnAnswer, scores: TokenScores, tokens: slice
) -> ScoredAnswer:
    def rounded(values: Any) -> list[float | None]:
        return [None if isnan(one) else round(one, 4) for one in values[tokens].tolist()]

    return ScoredAnswer(
        texts=token_texts(tokenizer, answer.ids),
        forward_kl=rounded(scores.forward_kl_N),
        reverse_kl=rounded(scores.reverse_kl_N),
        teacher_logprob=rounded(scores.teacher_logprob_N),
    )


def far_on_own_text(on_data: float, found: OwnText) -> list[str]:
    """A note if the student is much farther from its teacher on its own text than on data.

    on_data: KL(teacher ‖ student) on held-out text, in nats/token.
    """
    if not 0 < FAR * on_data < found.forward_kl:
        return []
    return [
        "On its own answers, the student's KL to the teacher is "
        f"{found.forward_kl:.3g} nats/token, {found.forward_kl / on_data:.1f} times its KL on "
        f"held-out text ({on_data:.3g}). Train longer on data, and then on its own text "
        "(train.on_policy)."
    ]
