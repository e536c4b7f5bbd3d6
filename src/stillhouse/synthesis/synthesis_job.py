"""The section `synthesize` with its models located, and the requests that it sends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.generation.chat_frame import Frame, text_of, user_turn
from stillhouse.generation.generation_config import SamplingRecipe
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Message, Request
from stillhouse.generation.text_teacher import DefaultModel, TextSource, text_source
from stillhouse.synthesis.judge_answers import Judge, open_judge
from stillhouse.synthesis.prompts import Prompt, read_prompts
from stillhouse.synthesis.synthesize_config import LikelihoodChoice, SynthesizeRecipe
from stillhouse.synthesis.write_prompts import Writer, combined


@dataclass(frozen=True)
class SynthesisJob:
    """A synthesis. default: the recipe's teacher. journal: path of the journal of all answers."""

    section: SynthesizeRecipe
    default: DefaultModel
    journal: Path
    seed: int = 0

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self.default.base

    def teacher(self) -> TextSource:
        """Open the teacher. Raises ModelError."""
        logprobs = isinstance(self.section.filters.best_of, LikelihoodChoice)
        return self._source(self.section.sampling, logprobs)

    def judge(self) -> Judge | None:
        """Open the judge, if any. Raises ModelError."""
        choice = self.section.filters.best_of
        return open_judge(choice, self.default, self.seed)

    def writer(self, journal: Journal | None) -> Writer | None:
        """The writer of prompts; None if the teacher writes none.

        Raises ModelError, and DataError for invalid examples.
        """
        section = self.section.prompts
        if section.write is None:
            return None
        assert section.combine is not None
        sampling = SamplingRecipe(
            temperature=section.write.temperature, max_tokens=section.write.max_tokens
        )
        # Each example is shown on one line.
        examples = [" ".join(text_of(p.messages).split()) for p in self._prompts_of_file(None)]
        source = self._source(sampling, False)
        return Writer(section.write, section.combine, source, tuple(examples), self.seed, journal)

    def prompts(self, writer: Writer | None = None) -> Iterator[Prompt]:
        """The prompts: from a file, combined, or written by the teacher."""
        section = self.section.prompts
        if writer is not None:
            found = writer.prompts()
        elif section.combine is not None:
            found = combined(section.combine, self.seed)
        else:
            return self._prompts_of_file(section.limit)
        return itertools.islice(found, section.limit)

    def chats(self, *, student: bool = False) -> Iterator[tuple[tuple[Message, ...], str]]:
        """Yield the chat that the teacher (or the student) sees for each prompt, and the prompt's
        place.

        If the teacher writes the prompts, a single placeholder stands for them.
        """
        section, frame = self.section.prompts, self.frame
        placeholder = [Prompt(user_turn("Write."), "the prompts")]
        seen = frame.student_sees if student else frame.teacher_sees
        for prompt in self.prompts() if section.write is None else placeholder:
            yield seen(prompt.messages), prompt.where

    @property
    def frame(self) -> Frame:
        """The frame around every prompt."""
        section = self.section.prompts
        examples = tuple((example.prompt, example.answer) for example in section.examples)
        return Frame(section.system, examples, section.student_sees)

    def _source(self, sampling: SamplingRecipe, logprobs: bool) -> TextSource:
        teacher, budget = self.section.teacher, self.section.budget
        return text_source(teacher, sampling, budget, self.default, self.seed, logprobs=logprobs)

    def _prompts_of_file(self, limit: int | None) -> Iterator[Prompt]:
        section = self.section.prompts
        if section.path is None:
            return iter(())
        path = self.base / section.path
        return read_prompts(path, format=section.format, key=section.key, limit=limit)


class SynthesisRequests:
    """The job's requests: each prompt, `samples` times. Call it to iterate over them.

    journal: contains the prompts that the teacher wrote; None: there are none yet.
    """

    def __init__(self, job: SynthesisJob, journal: Journal | None) -> None:
        self.job, self.journal = job, journal
        self.teacher, self.writer = job.teacher(), job.writer(journal)
        self.frame = job.frame

    def pairs(self) -> Iterator[tuple[Prompt, Request]]:
        for prompt in self.job.prompts(self.writer):
            messages = self.frame.teacher_sees(prompt.messages)
            for sample in range(self.job.section.prompts.samples):
                yield prompt, self.teacher.request(messages, sample)

    def __call__(self) -> Iterator[Request]:
        return (request for _, request in self.pairs())
