"""A classifier's recipe with its resolved models: the input of every stage of its run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.classify.classifier_students import student_source
from stillhouse.classify.classify_config import ClassifyRecipe, RandomClassifier
from stillhouse.classify.label_prompts import LabelPrompt, PromptTokens, prompt_tokens
from stillhouse.classify.task_texts import Texts, prepare_texts
from stillhouse.export.licenses import Origin, distinct, origin, teacher_origin
from stillhouse.generation.request import teacher_described
from stillhouse.hardware import choose_precision, default_device
from stillhouse.runfolder import answers_path
from stillhouse.tasks.task_facts import task_teacher
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import ModelSource


@dataclass(frozen=True)
class TaskJob:
    """A classifier's recipe with its models.

    base: the folder that relative paths start from. teacher: None for an API. journal: path of the
    journal of an API's answers. has_gold: whether enough training texts have reference labels to
    train on.
    """

    recipe: ClassifyRecipe
    base: Path
    teacher: ModelSource | None
    student: ModelSource
    journal: Path
    has_gold: bool = False

    @property
    def described(self) -> str:
        return teacher_described(self.recipe.teacher.api, self.teacher)

    @property
    def made_with(self) -> list[Origin]:
        """The models that the student is made with, the teacher first."""
        section, student = self.recipe.teacher, self.recipe.student
        teacher = teacher_origin(self.teacher, self.described, section.license)
        random = isinstance(student, RandomClassifier)
        part = "The student's tokenizer" if random else "The student's start"
        return distinct([teacher, origin(part, self.student)])

    def load_teacher(self, prompt: LabelPrompt) -> tuple[Any, PromptTokens]:
        """The model in the recipe's precision, and the prompt in its tokens."""
        assert self.teacher is not None
        section, device = self.recipe.teacher, default_device()
        dtype = choose_precision(section.precision, device).dtype
        model = load_model(self.teacher, dtype=dtype)
        tokenizer = load_tokenizer(self.teacher)
        return model.to(device), prompt_tokens(prompt, tokenizer, self.recipe.data.max_tokens)

    @cached_property
    def texts(self) -> Texts:
        """The recipe's texts, for checks before the stage `texts` has saved them. Raises DataError,
        RecipeError."""
        return prepare_texts(self.recipe, self.base)

    def prompt(self, texts: Texts) -> LabelPrompt:
        return LabelPrompt.of(self.recipe.task, texts.labels)


def find_task(recipe: ClassifyRecipe, base: Path) -> TaskJob:
    """Resolve the models. Raises ModelError."""
    teacher = task_teacher(recipe.teacher, base)
    student = student_source(recipe.student, teacher, base)
    return TaskJob(recipe, base, teacher, student, answers_path(recipe))
