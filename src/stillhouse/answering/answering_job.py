"""An answering recipe with its resolved models, and the language-model recipe that trains its
student."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.answering.answer_texts import AnswerTexts, prepare_answer_texts
from stillhouse.answering.answering_config import AnsweringRecipe, ExtractTask
from stillhouse.data.data_config import DataRecipe, FileSource
from stillhouse.evaluation.evaluate_config import EvaluateRecipe
from stillhouse.export.export_config import ExportRecipe
from stillhouse.export.licenses import Origin, distinct, origin, teacher_origin
from stillhouse.generation.chat_frame import Frame, user_turn
from stillhouse.generation.generation_config import LocalTeacher, TextTeacher, VllmTeacher
from stillhouse.generation.helpers import Helpers
from stillhouse.generation.request import Message, Requests, teacher_described
from stillhouse.generation.text_teacher import DefaultModel, TextSource, text_source
from stillhouse.language_model.job import Job
from stillhouse.language_model.recipe import Recipe, TeacherRecipe
from stillhouse.objectives.objective_config import LogitsTerm, ObjectiveRecipe
from stillhouse.runfolder import answers_path
from stillhouse.students.student_config import PretrainedStudent, PrunedStudent
from stillhouse.synthesis.filters import Filter, json_schema, read_schema
from stillhouse.synthesis.judge_answers import Judge, open_judge
from stillhouse.synthesis.synthesize_config import LikelihoodChoice
from stillhouse.tasks.task_facts import task_teacher
from stillhouse.teachers.model_source import ModelSource, resolve_model

TRAIN, HELDOUT, GOLD = "train.jsonl", "heldout.jsonl", "gold.jsonl"
"""Files of chats: training texts with the teacher's answers, test texts with the teacher's answers,
and training texts with reference answers."""


@dataclass(frozen=True)
class AnsweringJob:
    """An answering recipe with its models.

    base: the folder that relative paths start from. teacher: None for an API. journal: path of the
    journal of all answers. helpers: other processes that also answer requests, with local models.
    training, gold: the language-model jobs that train the student on the teacher's answers and on
    the reference answers; set once the answers exist. gold is None if there are no reference
    answers.
    """

    recipe: AnsweringRecipe
    base: Path
    teacher: ModelSource | None
    journal: Path
    helpers: Helpers | None = None
    training: Job | None = None
    gold: Job | None = None

    @property
    def described(self) -> str:
        return teacher_described(self.recipe.teacher.api, self.teacher)

    @property
    def made_with(self) -> list[Origin]:
        """The models that the student is made with, the teacher first. Raises ModelError."""
        section, student = self.recipe.teacher, self.recipe.student
        found = [teacher_origin(self.teacher, self.described, section.license)]
        if isinstance(student, PretrainedStudent | PrunedStudent) and student.model is not None:
            revision = student.revision if isinstance(student, PretrainedStudent) else None
            start = resolve_model(student.model, revision=revision, base=self.base, weights=False)
            found.append(origin("The student's start", start))
        return distinct(found)

    @property
    def schema(self) -> dict[str, Any] | None:
        """The schema of an answer; None for free text. Raises DataError if it cannot be read."""
        task = self.recipe.task
        if not isinstance(task, ExtractTask):
            return None
        return read_schema(self.base / task.json_schema)

    @property
    def validity(self) -> Filter | None:
        """A filter that returns why an answer does not match the schema; None for free text.

        Raises DataError or RecipeError if the schema cannot be used.
        """
        schema, task = self.schema, self.recipe.task
        if schema is None or not isinstance(task, ExtractTask):
            return None
        return json_schema(schema, self.base / task.json_schema)

    @cached_property
    def texts(self) -> AnswerTexts:
        """The recipe's texts, for checks before the stage `texts` has saved them. Raises DataError,
        RecipeError."""
        return prepare_answer_texts(self.recipe, self.base, self.validity)

    def question(self, text: str) -> str:
        return self.recipe.task.prompt.replace("{text}", text)

    @property
    def frame(self) -> Frame:
        task = self.recipe.task
        examples = tuple((self.question(one.text), one.answer) for one in task.examples)
        return Frame(task.system, examples, task.student_sees)

    def student_messages(self, text: str) -> tuple[Message, ...]:
        """The student's prompt."""
        return self.frame.student_sees(user_turn(self.question(text)))

    def teacher_messages(self, text: str) -> tuple[Message, ...]:
        """The teacher's prompt."""
        return self.frame.teacher_sees(user_turn(self.question(text)))

    @property
    def default(self) -> DefaultModel:
        teacher = self.recipe.teacher
        return DefaultModel(
            self.base,
            teacher.model or "",
            teacher.revision,
            teacher.trust_remote_code,
            self.helpers,
        )

    def source(self) -> TextSource:
        """The teacher as a source of answers. Raises ModelError."""
        section = self.recipe.teacher
        local, vllm = None, None
        if section.vllm is not None:
            vllm = VllmTeacher(**section.vllm.model_dump())
        elif section.model is not None:
            local = LocalTeacher(precision=section.precision, batch=section.batch)
        return text_source(
            TextTeacher(api=section.api, local=local, vllm=vllm),
            section.sampling,
            section.budget,
            self.default,
            self.recipe.seed,
            logprobs=isinstance(self.recipe.filters.best_of, LikelihoodChoice),
        )

    def requests(self, source: TextSource, texts: AnswerTexts) -> Requests:
        """`teacher.samples` requests for each training text, and then one for each test text."""
        samples = self.recipe.teacher.samples
        parts = ((texts.train, samples), (texts.test, 1))
        return lambda: (
            source.request(self.teacher_messages(row.text), number)
            for rows, count in parts
            for row in rows
            for number in range(count)
        )

    def judge(self) -> Judge | None:
        """The judge that chooses among several answers to a text. Raises ModelError."""
        choice = self.recipe.filters.best_of
        return open_judge(choice, self.default, self.recipe.seed)


def find_answering(recipe: AnsweringRecipe, base: Path) -> AnsweringJob:
    """Resolve the teacher. Raises ModelError."""
    teacher = task_teacher(recipe.teacher, base)
    return AnsweringJob(recipe, base, teacher, answers_path(recipe))


WORDS_ALONE = ObjectiveRecipe(terms=[LogitsTerm(divergence="cross_entropy")])


def training_recipe(recipe: AnsweringRecipe, chats: Path, rows: str = TRAIN) -> Recipe:
    """The language-model recipe that trains the student on the chats in a folder.

    If only the text is learned and the student starts from a different model, that model is the
    recipe's `teacher`, of which only the vocabulary is used.
    """
    teacher = TeacherRecipe(
        model=recipe.teacher.model or "",
        revision=recipe.teacher.revision,
        trust_remote_code=recipe.teacher.trust_remote_code,
        license=recipe.teacher.license,
    )
    student = recipe.student
    own = student.model if isinstance(student, PretrainedStudent | PrunedStudent) else None
    if recipe.learns_text_alone and own is not None:
        revision = student.revision if isinstance(student, PretrainedStudent) else None
        teacher = teacher.model_copy(update={"model": own, "revision": revision})
    chats = chats.absolute()
    return Recipe(
        name=recipe.name,
        folder=recipe.folder,
        seed=recipe.seed,
        teacher=teacher,
        data=DataRecipe(
            sources=[FileSource(kind="jsonl", path=str(chats / rows))],
            heldout_sources=[FileSource(kind="jsonl", path=str(chats / HELDOUT))],
            context=recipe.data.context,
            long_rows="drop",
        ),
        student=recipe.student,
        objective=WORDS_ALONE
        if recipe.learns_text_alone
        else recipe.objective or ObjectiveRecipe(),
        train=recipe.train,
        evaluate=EvaluateRecipe(),
        export=ExportRecipe(dtype=recipe.export.dtype),
    )
