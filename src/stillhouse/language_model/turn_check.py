"""Checks of a run's chat templates: the end of turns, and the date."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.data.chat_template import DATE, writes_date
from stillhouse.data.turn_end import turn_end
from stillhouse.finding import Finding
from stillhouse.language_model.job import Job
from stillhouse.teachers.load_model import load_tokenizer

TOPIC = "chat template"


def check_turns(job: Job) -> Iterator[Finding]:
    """Check the template of training text with chats."""
    code = job.trust_remote_code
    student = load_tokenizer(job.tokenizer_path, trust_remote_code=code)
    teacher = load_tokenizer(job.teacher.path, trust_remote_code=code)
    end, other = turn_end(student), turn_end(teacher)
    if end is not None:
        learned = f"an assistant's turn ends with {end.text}, which is learned and ends answers"
        yield Finding("ok", TOPIC, f"loss on assistant turns; {learned}; see `stillhouse preview`")
        if not end.written:
            text = f"it writes no token after an assistant's turn: {end.text} is added to each"
            fix = "a template that writes one makes longer rows: several turns share their context"
            yield Finding("warning", TOPIC, text, fix)
    differ = end is not None and other is not None and other.text != end.text
    if end is not None and job.folded:
        text = (
            "each model's own template renders the chats, unless both have the same tokens for it"
        )
        yield Finding("ok", TOPIC, text)
    elif differ and end is not None and other is not None:
        text = f"the teacher's turns end with {other.text}, and the student's with {end.text}"
        fix = (
            "the student's template is used for both, so its end-of-turn token may be new to the "
            "teacher: copy the teacher's chat_template.jinja into the student's folder"
        )
        yield Finding("warning", TOPIC, text, fix)
    if writes_date(student):
        text = f"it writes the date: {DATE:%d %B %Y} in every run, so that text never changes"
        yield Finding("ok", TOPIC, text)
