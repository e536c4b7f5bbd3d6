"""The recipe of an extract or generate task: a small language model learns a teacher's answers to
texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stillhouse.field_types import (
    AnswerTokens,
    Context,
    Count,
    PathText,
    SamplingTemperature,
    SmallCount,
)
from stillhouse.generation.generation_config import (
    TEMPERATURE,
    ApiTeacher,
    BudgetRecipe,
    SamplingRecipe,
    TaskTeacher,
    VerdictSampling,
    check_text_teacher,
)
from stillhouse.objectives.objective_config import LogitsTerm, ObjectiveRecipe
from stillhouse.run_recipe import RunRecipe
from stillhouse.section import Section
from stillhouse.students.student_config import PretrainedStudent, PrunedStudent, StudentRecipe
from stillhouse.synthesis.synthesize_config import FiltersRecipe, JudgeChoice
from stillhouse.tasks.task_texts_config import TaskTextsRecipe, TextPrompt
from stillhouse.training.train_config import TrainRecipe
from stillhouse.vllm_config import VllmEngine


class AnsweredExample(Section):
    text: str
    answer: str


class AnsweringTask(Section):
    """The prompt for each text."""

    system: str | None = Field(None, description="System prompt.")
    prompt: TextPrompt = Field(
        "{text}", description="The user turn; {text} is replaced by the text."
    )
    examples: list[AnsweredExample] = Field(
        default=[], description="Few-shot examples, placed before every prompt."
    )
    student_sees: Literal["prompt", "system", "all"] = Field(
        "system",
        description="The student's prompt: only the user turn (prompt), also the system prompt "
        "(system), or also the examples (all). The student learns to answer without the rest.",
    )


class ExtractTask(AnsweringTask):
    """Extract facts from a text as JSON."""

    kind: Literal["extract"]
    json_schema: PathText = Field(
        description="A file with the JSON schema of an answer. Answers that do not match it are "
        "not used for training."
    )


class GenerateTask(AnsweringTask):
    """Answer a text with free text."""

    kind: Literal["generate"]


class AnswerSampling(SamplingRecipe):
    """The teacher's sampling settings."""

    temperature: SamplingTemperature | None = Field(0.0, description=TEMPERATURE)
    max_tokens: AnswerTokens = Field(
        256,
        description="Maximum number of tokens in an answer, including its reasoning; also for the "
        "students' answers.",
    )


class AnswerTeacher(TaskTeacher):
    """A local model or an API."""

    batch: Count = Field(32, description="(model only) Number of answers generated together.")
    vllm: VllmEngine | None = Field(
        None, description="(model only) Generate answers with vLLM. Needs stillhouse[vllm]."
    )
    sampling: AnswerSampling = AnswerSampling()
    samples: SmallCount = Field(
        1,
        description="Number of answers to each training text; more than 1 needs a temperature "
        "above 0.",
    )

    @model_validator(mode="after")
    def _keys_fit_the_teacher(self) -> AnswerTeacher:
        if self.api is not None and self.vllm is not None:
            raise ValueError("vllm runs a local model: set model instead of api, or remove vllm")
        check_text_teacher(self.api, self.sampling, self.budget, self.samples)
        return self


class AnswerTextsRecipe(TaskTextsRecipe):
    context: Context = Field(1024, description="Tokens in one training window; drop longer rows.")


class ComparisonSampling(VerdictSampling):
    """The judge's sampling settings; a judge that reasons needs more tokens."""

    max_tokens: AnswerTokens = Field(
        8, description="Maximum number of tokens in a verdict, including its reasoning."
    )


class ComparisonRecipe(Section):
    """A judge that compares two answers, in both orders."""

    model: PathText | None = Field(None, description="A model, as in teacher.model.")
    api: ApiTeacher | None = None
    question: str = Field(
        "Which answer is better: more correct, more helpful, and as long as it needs to be?",
        description="The question that the judge answers about the two answers.",
    )
    sampling: ComparisonSampling = ComparisonSampling()
    budget: BudgetRecipe = BudgetRecipe()

    @model_validator(mode="after")
    def _is_one(self) -> ComparisonRecipe:
        if (self.model is None) == (self.api is None):
            raise ValueError("set exactly one of model and api")
        check_text_teacher(self.api, self.sampling, self.budget)
        return self


class AnswerMeasureRecipe(Section):
    fine_tuning_baseline: bool = Field(
        True, description="Also train the same student on the reference answers, if any."
    )
    likelihood: bool = Field(
        True,
        description="(generate only) Measure the likelihood of each model's answers under a local "
        "teacher.",
    )
    scorer: PathText | None = Field(
        None,
        description="A function to score answers, as path.py:function. It is called with the text, "
        "an answer, and the reference answer (or None), and must return a number; higher is "
        "better.",
    )
    judge: ComparisonRecipe | None = Field(
        None,
        description="(generate only) Let a judge compare the students' answers with the teacher's.",
    )
    speed_texts: Count = Field(16, description="Number of texts on which to measure speed.")

    @field_validator("scorer")
    @classmethod
    def _scorer_names_a_function(cls, scorer: str | None) -> str | None:
        path, colon, name = (scorer or "a.py:f").rpartition(":")
        if not colon or not path.endswith(".py") or not name.isidentifier():
            raise ValueError("write the scorer as path.py:function")
        return scorer


class AnswerExport(Section):
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class AnsweringRecipe(RunRecipe):
    """The recipe of a model that answers texts."""

    task: Annotated[ExtractTask | GenerateTask, Field(discriminator="kind")]
    teacher: AnswerTeacher
    data: AnswerTextsRecipe
    filters: FiltersRecipe = Field(
        FiltersRecipe(), description="Filters that drop some of the teacher's answers."
    )
    student: StudentRecipe
    objective: ObjectiveRecipe | None = Field(
        None,
        description="What the student learns from the teacher's answers; null: a local teacher's "
        "distributions (forward KL), or only the text if the teacher is an API or its prompt has "
        "parts that the student does not see (task.student_sees).",
    )
    train: TrainRecipe = TrainRecipe()
    evaluate: AnswerMeasureRecipe = AnswerMeasureRecipe()
    export: AnswerExport = AnswerExport()

    @property
    def teacher_sees_more(self) -> bool:
        """Whether the teacher's prompt has parts that the student does not see."""
        task = self.task
        examples = bool(task.examples) and task.student_sees != "all"
        return examples or (task.system is not None and task.student_sees == "prompt")

    @property
    def learns_text_alone(self) -> bool:
        """Whether only the teacher's text is learned, not its distributions.

        This is the default if the teacher's prompt has parts that the student does not see: given
        the student's prompt, which training uses, the teacher would not give these answers.
        """
        if self.objective is None:
            return self.teacher.api is not None or self.teacher_sees_more
        return all(
            isinstance(term, LogitsTerm) and term.divergence == "cross_entropy"
            for term in self.objective.terms
        )

    @model_validator(mode="after")
    def _words_or_distributions(self) -> AnsweringRecipe:
        if self.teacher.api is not None and not self.learns_text_alone:
            raise ValueError(
                "an API only returns text: remove objective, or use divergence: cross_entropy"
            )
        student = self.student
        if self.teacher.api is not None and not (
            isinstance(student, PretrainedStudent | PrunedStudent) and student.model is not None
        ):
            raise ValueError(
                "with an API as teacher, the student needs a model to start from: set "
                "student.start to pretrained or pruned, and student.model"
            )
        if isinstance(student, PrunedStudent) and student.vocabulary is not None:
            raise ValueError(
                "student.vocabulary is only for language-model runs: remove it, and set other sizes"
            )
        if self.train.teachers:
            raise ValueError("train.teachers is not supported here: remove it, and use `teacher`")
        if self.train.on_policy is not None and self.learns_text_alone:
            raise ValueError(
                "train.on_policy needs a local teacher's distributions, but this recipe learns "
                "only the teacher's text: remove on_policy; or use teacher.model, and "
                "task.student_sees: all if the teacher has a system prompt or examples"
            )
        return self

    @model_validator(mode="after")
    def _best_of_several(self) -> AnsweringRecipe:
        choice = self.filters.best_of
        if choice is not None and self.teacher.samples < 2:
            raise ValueError("filters.best_of chooses among several answers: set teacher.samples")
        here = choice.teacher.here if isinstance(choice, JudgeChoice) else None
        if here is not None and here.model is None and self.teacher.model is None:
            raise ValueError(
                "the judge has no model, and the teacher is an API: set filters.best_of.teacher"
            )
        return self

    @model_validator(mode="after")
    def _measures_fit_the_task(self) -> AnsweringRecipe:
        if isinstance(self.task, ExtractTask):
            if self.evaluate.judge is not None:
                raise ValueError("evaluate.judge is only for kind: generate")
            if self.filters.json_schema is not None:
                raise ValueError("task.json_schema is the schema: remove filters.json_schema")
        return self
