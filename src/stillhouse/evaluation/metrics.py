"""The metrics table of each kind of evaluation, which the terminal, report, and model card show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

from stillhouse import number_format as text
from stillhouse.evaluation.answers import AnswersEvaluation
from stillhouse.evaluation.classification_results import Abstention, ClassificationEvaluation
from stillhouse.evaluation.family_evaluation import FamilyEvaluation
from stillhouse.evaluation.metrics_table import Cell, Column, MetricsTable, Row
from stillhouse.evaluation.results import Evaluation, ModelResult, role_name, role_order


class Metric(NamedTuple):
    """A row of a table. path: attributes or keys that lead from a column's data to the value."""

    name: str
    path: Sequence[str]
    show: Callable[[Any], str]
    definition: str = ""


Remark = Callable[[Metric, Any], str]


@singledispatch
def metrics_of(evaluation: Any) -> MetricsTable:
    """The table of an Evaluation, ClassificationEvaluation, AnswersEvaluation, or FamilyEvaluation:
    one column per model, and one row per metric that was measured."""
    raise TypeError(f"{type(evaluation).__name__} is not an evaluation")


def _table(
    title: str,
    results: Iterable[Any],
    metrics: Iterable[Metric],
    notes: list[str],
    remark: Remark = lambda metric, model: "",
) -> MetricsTable:
    """The table of results by role, in the order of `ROLE_NAMES`."""
    ordered = sorted(results, key=lambda result: role_order(result.role))
    columns = [Column(role_name(result.role), result.role) for result in ordered]
    return MetricsTable(title, columns, _rows(metrics, ordered, remark), notes)


def _rows(
    metrics: Iterable[Metric],
    columns: Sequence[Any],
    remark: Remark = lambda metric, model: "",
) -> list[Row]:
    """The metrics' rows, with a dash for models that were not measured. A metric that was not
    measured for any model has no row."""
    rows = []
    for metric in metrics:
        values = [_value(column, metric.path) for column in columns]
        if any(value is not None for value in values):
            cells = [
                Cell(text.DASH)
                if value is None
                else Cell(metric.show(value), remark(metric, column))
                for column, value in zip(columns, values, strict=True)
            ]
            rows.append(Row(metric.name, cells, metric.definition))
    return rows


def _value(data: Any, path: Sequence[str]) -> Any:
    """The value at the path; None if any part of the path is missing or None."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else getattr(data, key, None)
    return data


def _percent(share: float) -> str:
    return text.percent(share, 1)


def _perplexity(value: float) -> str:
    return text.digits(value, 4)


# --- language models ---------------------------------------------------------------------------

_TOP1 = (
    "Top-1 agreement: share of held-out positions where the model's top-1 token is the teacher's."
)
_KL = "KL to the teacher: mean KL(teacher ‖ model) of next-token distributions; 0 means identical."
_DISK = (
    "Size on disk: bytes of the weights; in a run, all models are counted in the export's dtype."
)
_SPEED = (
    "Speed: one sequence at a time, alternating between all models in one run; medians. Peak "
    "memory: of each model alone."
)
_KL_PATH, _PERPLEXITY_PATH = ("fidelity", "kl"), ("fidelity", "perplexity")
_FIDELITY = (
    Metric("Top-1 agreement", ("fidelity", "top1_agreement"), _percent, _TOP1),
    Metric(
        "KL to the teacher (nats/token)",
        _KL_PATH,
        text.tiny,
        f"{_KL} Gap closed: 1 − KL / the untrained student's KL.",
    ),
    Metric(
        "Perplexity, held-out text",
        _PERPLEXITY_PATH,
        _perplexity,
        "Perplexity: exp of the mean negative log-likelihood of the text's own tokens; lower is "
        "better. Percentage: the teacher's perplexity / the model's.",
    ),
    Metric(
        "Bits per byte, held-out text",
        ("fidelity", "bits_per_byte"),
        _perplexity,
        "Bits per byte: the text's negative log-likelihood in bits / its bytes, comparable across "
        "tokenizers; lower is better.",
    ),
    Metric(
        "Calibration error",
        ("fidelity", "calibration_error"),
        _percent,
        "Calibration error: mean difference between the top-1 probability and its accuracy, in 15 "
        "bins of equal width; lower is better.",
    ),
)
_ROOTS = (
    "Shared roots: the teacher has a different tokenizer, so distributions are compared over the "
    "strings that are tokens of both, at positions where both begin a token."
)
_TOP1_ROOTS = "Top-1 agreement: share of positions where the most likely root is the teacher's."
_OWN_PERPLEXITY = (
    "Perplexity: exp of the mean negative log-likelihood of the model's own tokens; use bits per "
    "byte to compare models with different tokenizers."
)
_OVER_ROOTS = {
    "top1_agreement": ("Top-1 agreement, shared roots", f"{_TOP1_ROOTS} {_ROOTS}"),
    "kl": ("KL to the teacher, shared roots (nats/token)", f"{_FIDELITY[1].definition} {_ROOTS}"),
    "perplexity": ("Perplexity of own tokens, held-out text", _OWN_PERPLEXITY),
}
"""Names and definitions of fidelity metrics for a teacher with a different tokenizer."""


def _named(metrics: Iterable[Metric], teacher: ModelResult | None) -> list[Metric]:
    """The metrics, renamed if models were compared over shared roots."""
    if teacher is None or not _is_folded(teacher):
        return list(metrics)
    found = []
    for metric in metrics:
        *parts, key = metric.path
        if parts[-1:] == ["fidelity"] and key in _OVER_ROOTS:
            name, definition = _OVER_ROOTS[key]
            metric = metric._replace(name=name, definition=definition)
        found.append(metric)
    return found


def _is_folded(model: ModelResult) -> bool:
    return model.fidelity.compared is not None


_COST = (
    Metric("Parameters", ("parameters",), text.count),
    Metric("Non-embedding parameters", ("non_embedding_parameters",), text.count),
    Metric("Size on disk", ("bytes_on_disk",), text.size, _DISK),
    Metric("Prefill (tokens/s)", ("speed", "prefill_tokens_per_s"), text.digits, _SPEED),
    Metric("Decoding (tokens/s)", ("speed", "decode_tokens_per_s"), text.digits, _SPEED),
    Metric("Peak memory", ("speed", "peak_memory_bytes"), text.size, _SPEED),
)


_OWN_KL = (
    "KL on own text: mean over the tokens of the model's own answers, in nats/token. Teacher ‖ "
    "model: as on held-out text; model ‖ teacher: high where the model is likely to go, but the "
    "teacher is not. Log-probability by the teacher: mean over the answers' tokens; higher is "
    "better."
)
_OWN_FORM = (
    "Repetition: share of 4-grams that occur earlier in the same answer. Cut off: share of answers "
    "that reached the token limit."
)
_OWN_TEXT = (
    Metric("KL on own text, teacher ‖ model", ("own_text", "forward_kl"), text.tiny, _OWN_KL),
    Metric("KL on own text, model ‖ teacher", ("own_text", "reverse_kl"), text.tiny, _OWN_KL),
    Metric("Own text: log-probability by the teacher", ("own_text", "teacher_logprob"),
           text.digits, _OWN_KL),
    Metric("Own text: entropy (nats/token)", ("own_text", "entropy"), text.digits),
    Metric("Own text: repetition", ("own_text", "repetition"), _percent, _OWN_FORM),
    Metric("Own text: answers cut off", ("own_text", "cut_off"), _percent, _OWN_FORM),
    Metric("Own text: tokens per answer", ("own_text", "length"), text.digits),
)  # fmt: skip
_WITHOUT_REMARK = {metric.path for metric in (_FIDELITY[0], *_FIDELITY[3:], *_OWN_TEXT)}


@metrics_of.register
def _(found: Evaluation) -> MetricsTable:
    score = "Task scores: as reported by lm-eval."
    names = dict.fromkeys(name for model in found.models for name in model.tasks)
    tasks = [Metric(name, ("tasks", name), text.digits, score) for name in names]

    def remark(metric: Metric, model: ModelResult) -> str:
        return _beside_the_others(metric, model, found)

    # Not the first model, the teacher: its tokenizer, and so its number of tokens, can differ.
    positions = found.models[-1].fidelity.tokens if found.models else 0
    title = f"Measured on {positions:,} positions of held-out text"
    metrics = _named([*_FIDELITY, *_OWN_TEXT, *tasks, *_COST], found.result("teacher"))
    return _table(title, found.models, metrics, found.notes, remark)


def _beside_the_others(metric: Metric, model: ModelResult, found: Evaluation) -> str:
    """The value as a percentage of the teacher's, or for KL the part of the gap that training
    closed. Empty if there is nothing to compare with, or a percentage would be misleading."""
    teacher, untrained = found.result("teacher"), found.result("untrained")
    if metric.path == _KL_PATH:
        if untrained is None or model.role in ("teacher", "untrained") or not untrained.fidelity.kl:
            return ""
        closed = 1 - model.fidelity.kl / untrained.fidelity.kl
        if closed < 0:
            return f"{text.percent(-closed)} more than untrained"
        return f"{text.percent(closed)} of the gap closed"
    theirs = _value(teacher, metric.path)
    if not theirs or teacher is None or model is teacher or metric.path in _WITHOUT_REMARK:
        return ""
    if metric.path == _PERPLEXITY_PATH and _is_folded(teacher):
        return ""
    kept = _value(model, metric.path) / theirs
    return f"{text.percent(1 / kept if metric.path == _PERPLEXITY_PATH else kept)} of teacher"


# --- classifiers -------------------------------------------------------------------------------

_CLASSIFIER = (
    Metric("Accuracy", ("accuracy",), _percent),
    Metric("Macro-F1", ("macro_f1",), "{:.3f}".format),
    Metric("Agreement with the teacher", ("agreement",), _percent),
    Metric("KL to the teacher (nats/text)", ("kl",), text.tiny),
    Metric(
        "Calibration error",
        ("ece",),
        "{:.3f}".format,
        "Calibration error (ECE): mean difference between confidence and accuracy, in 15 bins.",
    ),
    Metric("Calibration error, teacher's labels", ("ece_teacher",), "{:.3f}".format),
    Metric(
        "Brier score",
        ("brier",),
        "{:.3f}".format,
        "Brier score: squared distance to the true label, from 0 to 2.",
    ),
    Metric("Parameters", ("parameters",), text.count),
    Metric("Size on disk", ("bytes_on_disk",), text.size),
    Metric(
        "Texts/s",
        ("texts_per_s",),
        text.digits,
        "Texts/s: on the same texts, one model after another; the teacher scores all labels of a "
        "text in one pass, and reads the prompt's prefix only once.",
    ),
)


@metrics_of.register
def _(found: ClassificationEvaluation) -> MetricsTable:
    title = f"Measured on {found.texts:,} test texts, {len(found.labels)} labels"
    notes = [abstention_sentence(found.abstention), *found.notes]
    return _table(title, found.results, _CLASSIFIER, notes)


def abstention_sentence(chosen: Abstention) -> str:
    """Describe the threshold's goal, and what it reaches on the test texts."""
    reference = "the teacher" if chosen.measure == "agreement" else "the true label"
    goal = f"{text.percent(chosen.wanted)} {chosen.measure} with {reference}"
    confidence = text.percent(chosen.sureness)
    if chosen.threshold is None:
        return (
            f"No threshold for abstaining: on the calibration texts, no threshold reaches {goal} "
            f"at a confidence level of {confidence}."
        )
    reached = (
        ""
        if chosen.test_reached is None
        else f" and reaches {text.percent(chosen.test_reached, 1)}"
    )
    return (
        f"Goal: {goal}, at a confidence level of {confidence}. With a threshold of "
        f"{chosen.threshold:.2f}, the student answers {text.percent(chosen.test_coverage)} of the "
        f"test texts{reached}."
    )


# --- answers -----------------------------------------------------------------------------------

ANSWER_METRICS = {
    key: Metric(name, ("figures", key), show)
    for key, name, show in (
        ("valid", "Valid by the schema", _percent),
        ("field_f1", "Field F1, reference answers", "{:.3f}".format),
        ("exact", "Exact match, reference answers", _percent),
        ("agreement_f1", "Field F1, teacher's answers", "{:.3f}".format),
        ("agreement", "Exact match, teacher's answers", _percent),
        ("surprise", "Negative log-likelihood under the teacher (nats/token)", "{:.3f}".format),
        ("preferred", "Preferred to the teacher's answer by the judge", _percent),
        ("consistent", "Same verdict of the judge in both orders", _percent),
        ("judge_read", "Verdicts that could be read", _percent),
        ("score", "Score", text.digits),
        ("parameters", "Parameters", text.count),
        ("answers_per_s", "Answers/s", text.digits),
    )
}


@metrics_of.register
def _(found: AnswersEvaluation) -> MetricsTable:
    names = sorted({name for result in found.results for name in result.fields})
    fields = [Metric(f"Field F1: {name}", ("fields", name), "{:.3f}".format) for name in names]
    title = f"Measured on {found.texts:,} test texts"
    return _table(title, found.results, [*ANSWER_METRICS.values(), *fields], found.notes)


# --- families ----------------------------------------------------------------------------------


def _changes(shape: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{text.label(key)} {old:,} → {new:,}" for key, (old, new) in shape.items())


_FAMILY = (
    Metric("Cut here", ("shape",), _changes),
    Metric("Parameters", ("student", "parameters"), text.count),
    Metric("Size on disk", ("student", "bytes_on_disk"), text.size,
           "Size on disk: bytes of the weights in the export's dtype."),
    Metric("Top-1 agreement", ("student", "fidelity", "top1_agreement"), _percent, _TOP1),
    Metric("KL to the teacher (nats/token)", ("student", "fidelity", "kl"), text.tiny, _KL),
    Metric("KL as pruned (nats/token)", ("untrained", "fidelity", "kl"), text.digits,
           "KL as pruned: before training."),
    Metric("Recovered", ("recovered",), text.percent,
           "Recovered: the share of the KL as pruned that training removed."),
    Metric("Perplexity, held-out text", ("student", "fidelity", "perplexity"), _perplexity),
    Metric("Bits per byte, held-out text", ("student", "fidelity", "bits_per_byte"), _perplexity),
    Metric("Decoding, relative to the teacher", ("decoding",),
           lambda value: f"{value:.2f}{text.NBSP}×"),
    Metric("Peak memory", ("student", "speed", "peak_memory_bytes"), text.size),
    Metric("Time", ("seconds",), text.seconds, "Time: of the work for this member alone."),
)  # fmt: skip


@metrics_of.register
def _(found: FamilyEvaluation) -> MetricsTable:
    """One column for the teacher, each member, and each member's quantized model."""
    columns = [Column("Teacher, cut" if found.cut else "Teacher", "teacher")]
    models: list[Any] = [{"student": found.teacher, "decoding": found.teacher.speed and 1.0}]
    for member in found.members:
        columns.append(Column(member.name))
        models.append(member)
        if member.quantized is not None:
            kind = role_name(member.quantized.role).removeprefix("Student, ")
            columns.append(Column(f"{member.name}, {kind}"))
            models.append({"student": member.quantized})
    positions = found.members[0].student.fidelity.tokens
    title = f"Measured on {positions:,} positions of held-out text"
    return MetricsTable(title, columns, _rows(_named(_FAMILY, found.teacher), models))
