"""Lets a judge compare the students' answers with the teacher's, each pair in both orders."""

from __future__ import annotations

from stillhouse.answering.answering_job import AnsweringJob
from stillhouse.evaluation.answers import compare
from stillhouse.generation.answer_requests import answer_all
from stillhouse.generation.chat_frame import answer_text, user_turn
from stillhouse.generation.generation_config import LocalTeacher, TextTeacher
from stillhouse.generation.text_teacher import DefaultModel, TextSource, text_source
from stillhouse.synthesis.judge_answers import read_verdict
from stillhouse.tasks.labeled_texts import LabeledText


def compare_answers(
    job: AnsweringJob, rows: list[LabeledText], answers: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Compare each student's answers with the teacher's; return figures by role.

    `preferred` is the share of pairs that are wins, counting ties as half; `consistent` is the
    share of pairs whose verdict does not depend on the order; `judge_read` is the share of pairs
    with readable verdicts. Texts that the teacher did not answer are left out.
    """
    source, judge = comparison_source(job), job.recipe.evaluate.judge
    assert source is not None
    assert judge is not None
    roles = [role for role in answers if role != "teacher"]
    compared = [number for number, answer in enumerate(answers["teacher"]) if answer.strip()]
    pairs = []
    for role in roles:
        for number in compared:
            text, ours, theirs = (
                rows[number].text,
                answers[role][number],
                answers["teacher"][number],
            )
            pairs += [(text, ours, theirs), (text, theirs, ours)]
    prompts = [user_turn(verdict_prompt(judge.question, *pair)) for pair in pairs]
    replies = answer_all(
        source, lambda: map(source.request, prompts), job.journal, "evaluate.judge.budget"
    )
    verdicts = [None if one is None else read_verdict(answer_text(one)) for one in replies.found]
    found: dict[str, dict[str, float]] = {}
    for number, role in enumerate(roles):
        part = verdicts[2 * len(compared) * number : 2 * len(compared) * (number + 1)]
        result = compare(list(zip(part[::2], part[1::2], strict=True)))
        read = len(compared) - result.unread
        found[role] = {"judge_read": read / len(compared)}
        if read:
            found[role] |= {"preferred": result.preferred, "consistent": result.consistent / read}
    return found


def comparison_source(job: AnsweringJob) -> TextSource | None:
    """Open the judge that compares answers, if any. Raises ModelError."""
    judge = job.recipe.evaluate.judge
    if judge is None:
        return None
    local = None if judge.model is None else LocalTeacher(model=judge.model)
    teacher = TextTeacher(api=judge.api, local=local)
    default = DefaultModel(job.base, helpers=job.helpers)
    return text_source(teacher, judge.sampling, judge.budget, default, job.recipe.seed)


def verdict_prompt(question: str, text: str, first: str, second: str) -> str:
    return (
        f"A text:\n{text}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n{question} "
        "Say A, B or tie, and nothing else."
    )
