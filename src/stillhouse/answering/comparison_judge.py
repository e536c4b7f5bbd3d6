"""A judge compares the students' answers with the teacher's, each pair in both orders."""

from __future__ import annotations

import re

from stillhouse.answering.answering_job import AnsweringJob
from stillhouse.classify.task_texts import LabelledText
from stillhouse.evaluation.answers import compare
from stillhouse.generation.answer_requests import answer_all
from stillhouse.generation.chat_frame import answer_text, user_turn
from stillhouse.generation.generation_config import LocalTeacher, TextTeacher
from stillhouse.generation.text_teacher import DefaultModel, TextSource, text_source

_VERDICT = re.compile(r"\b(A|B|tie|Tie|TIE)\b")
"""In capitals: `a` is mostly the article."""


def compare_answers(
    job: AnsweringJob, rows: list[LabelledText], said: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """By role, all but the teacher's: `preferred`, wins and half of the ties among all pairs; and
    `consistent`, the share of pairs of which the verdict does not depend on the order."""
    source, judge = comparison_source(job), job.recipe.evaluate.judge
    assert source is not None
    assert judge is not None
    roles = [role for role in said if role != "teacher"]
    pairs = [
        pair
        for role in roles
        for row, ours, theirs in zip(rows, said[role], said["teacher"], strict=True)
        for pair in ((row.text, ours, theirs), (row.text, theirs, ours))
    ]
    prompts = [user_turn(verdict_prompt(judge.question, *pair)) for pair in pairs]
    answers = answer_all(
        source, lambda: map(source.request, prompts), job.journal, "evaluate.judge.budget"
    )
    verdicts = [None if one is None else read_verdict(answer_text(one)) for one in answers.found]
    found: dict[str, dict[str, float]] = {}
    for number, role in enumerate(roles):
        part = verdicts[2 * len(rows) * number : 2 * len(rows) * (number + 1)]
        result = compare(list(zip(part[::2], part[1::2], strict=True)))
        read = len(rows) - result.unread
        found[role] = {"judge_read": read / len(rows)}
        if read:
            found[role] |= {"preferred": result.preferred, "consistent": result.consistent / read}
    return found


def comparison_source(job: AnsweringJob, *, weights: bool = True) -> TextSource | None:
    """The judge that compares answers, if any. weights: as in `text_source`. Raises ModelError."""
    judge = job.recipe.evaluate.judge
    if judge is None:
        return None
    local = None if judge.model is None else LocalTeacher(model=judge.model)
    teacher, default = TextTeacher(api=judge.api, local=local), DefaultModel(job.base)
    return text_source(
        teacher, judge.sampling, judge.budget, default, job.recipe.seed, weights=weights
    )


def verdict_prompt(question: str, text: str, first: str, second: str) -> str:
    return (
        f"A text:\n{text}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n{question} "
        "Say A, B or tie, and nothing else."
    )


def read_verdict(text: str) -> str | None:
    """A, B or tie; None where it is not exactly one of them."""
    found = {word if word in "AB" else "tie" for word in _VERDICT.findall(text)}
    return found.pop() if len(found) == 1 else None
