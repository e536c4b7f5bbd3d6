"""Results of an evaluation, as plain data that is saved as JSON and shown in the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter
from rich.console import Console

from stillhouse import number_format as text
from stillhouse.atomic_files import write_atomically
from stillhouse.errors import RunError
from stillhouse.generation.own_text_figures import OwnText

EVALUATION = "evaluation.json"
"""File in the folder of an `evaluate` stage."""


@dataclass(frozen=True)
class Saved:
    """A dataclass that is saved as a JSON file."""

    def save(self, path: Path) -> None:
        """Write the file atomically. Raises RunError if it cannot be written."""
        write_atomically(path, json.dumps(asdict(self), indent=2, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file. Raises RunError if it is missing or damaged."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(
                f"the evaluation cannot be read: {str(error).splitlines()[0]}",
                where=path,
                fix="delete its folder and run `stillhouse run` again",
            ) from error


@dataclass(frozen=True)
class Fidelity:
    """How close a model's next-token distribution is to the teacher's, on held-out text.

    perplexity: exp of the mean negative log-likelihood of the text's own next tokens.
    kl: mean KL(teacher ‖ model) in nats/token; 0 for the teacher itself.
    top1_agreement: fraction of positions where both models have the same top-1 token.
    calibration_error: expected calibration error of the top-1 probability, with 15 bins of equal
        width.
    tokens: number of supervised positions.
    bits_per_byte: negative log-likelihood in bits per byte of text, comparable across tokenizers;
        None if the tokenizer does not define its tokens' bytes.
    compared: for a teacher with a different tokenizer, the number of positions where both begin a
        token. `kl` and `top1_agreement` are then means over these positions, of distributions over
        shared roots; everything else is for the model's own tokens. None: same tokenizer.
    """

    perplexity: float
    kl: float
    top1_agreement: float
    calibration_error: float
    tokens: int
    bits_per_byte: float | None = None
    compared: int | None = None


@dataclass(frozen=True)
class Speed:
    """Speed in tokens/s, measured in one run alternating with the other models, and memory."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class ModelResult:
    """One model's measurements.

    role: a key of `ROLE_NAMES`.
    tasks: scores of lm-eval tasks.
    own_text: measurements on the model's own answers.
    """

    role: str
    parameters: int
    non_embedding_parameters: int
    bytes_on_disk: int
    fidelity: Fidelity
    speed: Speed | None = None
    tasks: dict[str, float] = field(default_factory=dict)
    own_text: OwnText | None = None

    def decoding_speedup(self, over: ModelResult | None) -> float | None:
        """Decoding speed as a multiple of that of `over`; None if either was not measured."""
        if over is None or self.speed is None or over.speed is None:
            return None
        theirs = over.speed.decode_tokens_per_s
        return self.speed.decode_tokens_per_s / theirs if theirs else None


@dataclass(frozen=True)
class Generation:
    """Every model's answer to one prompt, by role."""

    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class ScoredAnswer:
    """A model's own answer, token by token.

    texts: the text that each token adds, including special tokens.

    See `TokenScores` for the other fields, where NaN is None here.
    """

    texts: list[str]
    forward_kl: list[float | None]
    reverse_kl: list[float | None]
    teacher_logprob: list[float | None]


@dataclass(frozen=True)
class ScoredAnswers:
    """Every model's scored answer to one prompt, by role."""

    prompt: str
    answers: dict[str, ScoredAnswer]


@dataclass(frozen=True, repr=False)
class Evaluation(Saved):
    """The evaluation of a run's models and their teacher; printing it shows the metrics table."""

    models: list[ModelResult]
    generations: list[Generation]
    notes: list[str] = field(default_factory=list)
    scored_answers: list[ScoredAnswers] = field(default_factory=list)

    def result(self, role: str) -> ModelResult | None:
        return next((model for model in self.models if model.role == role), None)

    def __repr__(self) -> str:
        from stillhouse.evaluation.metrics import metrics_of
        from stillhouse.evaluation.metrics_table import to_rich

        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(to_rich(metrics_of(self)))
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).rstrip()


ROLE_NAMES = {
    "teacher": "Teacher",
    "student": "Student, distilled",
    "untrained": "Student, untrained",
    "cut": "Student, not refit",
    "fine_tuned": "Student, fine-tuned",
    "quantized": "Student, quantized",
    "quantized_trained": "Student, QAT",
}


def role_name(role: str) -> str:
    """The role's display name; other names, such as a family member's, are returned as they are."""
    return ROLE_NAMES.get(role, role)


def role_order(role: str) -> int:
    """A role's position among the columns; unknown roles come last."""
    return list(ROLE_NAMES).index(role) if role in ROLE_NAMES else len(ROLE_NAMES)


_TRAININGS = (
    ("untrained", "student", "training", "train.learning_rate", "data.train_tokens"),
    (
        "quantized",
        "quantized_trained",
        "training with quantized weights",
        "quantize.qat.learning_rate",
        "quantize.qat.tokens",
    ),
)
"""For each training: the roles before and after it, its name, and the keys to change if it does
harm."""


def farther_after_training(models: Sequence[ModelResult]) -> list[str]:
    """A sentence for each training that did not lower the KL on held-out text."""
    kl = {model.role: model.fidelity.kl for model in models}
    return [
        f"The student is no closer to the teacher after {name}: KL on held-out text is "
        f"{text.tiny(kl[after])} nats/token, compared with {text.tiny(kl[before])} before. Lower "
        f"{rate}, or train on more text ({amount})."
        for before, after, name, rate, amount in _TRAININGS
        if before in kl and after in kl and kl[after] >= kl[before]
    ]
