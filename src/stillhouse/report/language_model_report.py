"""The report on a language model: the student's quality, training, and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stillhouse import account
from stillhouse import number_format as text
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.metrics_table import MetricsTable
from stillhouse.evaluation.results import (
    Evaluation,
    ModelResult,
    farther_after_training,
    role_name,
    role_order,
)
from stillhouse.report.charts import ACCENT, MUTED, Chart, LineChart, dot, in_units, role_color
from stillhouse.report.formats import KL_LABEL, Replays, forms, forms_section
from stillhouse.report.history import Rows, kl_temperature, training_section
from stillhouse.report.own_text_report import own_text_section
from stillhouse.report.page import Answer, Figure, Report, Section, SideBySide
from stillhouse.report.sections import (
    RunFacts,
    assemble,
    cost_section,
    filled,
    generations_section,
    notes_section,
)
from stillhouse.report.steps_report import steps_section

OPTIMAL_TOKENS = 20
"""Training tokens per parameter above which more parameters use FLOPs better than more tokens do
(Hoffmann et al. 2022, arXiv 2203.15556)."""


def language_model_report(
    run: RunFacts,
    *,
    evaluation: Evaluation,
    history: Rows,
    student: Mapping[str, Any],
    replays: Replays,
    notes: Sequence[str] = (),
) -> Report:
    """Build the report; sections without data are hidden.

    evaluation: of a teacher, a student, and any other roles. history: the rows of metrics.jsonl:
    training rows with `step`, `tokens`, and `loss`, and held-out rows with `step` and `heldout_kl`.
    student: how the student was built (`stillhouse.students.build_student`); its `notes` are added
    to the page's. replays: each export's comparison with its source
    (`stillhouse.export.gate.ReplayResult` as a dictionary).
    """
    kind = str((run.recipe.get("quantize") or {}).get("kind", ""))
    models = {m.role: m for m in sorted(evaluation.models, key=lambda m: role_order(m.role))}
    steps = steps_section(evaluation, student, kind, replays)
    texts = generations_section(evaluation.generations)
    charts = [size_chart(evaluation.models), *speed_charts(evaluation.models)]
    table = metrics_of(evaluation)
    kept = Section("What the student kept", "kept", table=table, charts=charts)
    return assemble(
        "distillation",
        run,
        _headline(models, run),
        steps,
        *((texts, kept) if not steps.is_empty else (kept, texts)),
        training_section(history, kl_temperature(run.recipe)),
        own_text_section(evaluation.scored_answers, history),
        cost_section(run.stages, _scratch_part(run, student)),
        Section("The student", "student", facts=student_facts(student)),
        _export_section(models, replays),
        notes_section(
            notes,
            _student_notes(student),
            evaluation.notes,
            *(replay.get("notes", []) for replay in replays),
        ),
        remarks=_remarks(models, kind),
        figures=_figures(run, models),
    )


# --- headline and key figures ----------------------------------------------------------------


def _headline(models: Mapping[str, ModelResult], run: RunFacts) -> str:
    teacher, student = models["teacher"], models["student"]
    sentence = (
        f"The student keeps {text.percent(student.fidelity.top1_agreement)} of the teacher’s top-1 "
        f"choices at {text.percent(student.parameters / teacher.parameters)} of its parameters"
    )
    faster = student.decoding_speedup(teacher)
    if faster is not None:
        sentence += f" and {text.digits(faster)} times its decoding speed"
    trained = run.cost("train")
    if trained is not None:
        sentence += f", after {text.count(trained.tokens)} tokens of distillation"
    return sentence + "."


def _remarks(models: Mapping[str, ModelResult], kind: str) -> list[str]:
    untrained, tuned = models.get("untrained"), models.get("fine_tuned")
    rounded = models.get("quantized_trained") or models.get("quantized")
    parts = []
    if untrained:
        parts.append(f"before training, it kept {text.percent(untrained.fidelity.top1_agreement)}")
    if tuned:
        parts.append(
            "plain fine-tuning on the same tokens keeps "
            f"{text.percent(tuned.fidelity.top1_agreement)}"
        )
    if rounded:
        parts.append(
            f"in {kind}, it keeps {text.percent(rounded.fidelity.top1_agreement)} at "
            f"{text.size(float(rounded.bytes_on_disk))}, compared with the teacher’s "
            f"{text.size(float(models['teacher'].bytes_on_disk))}"
        )
    line = "; ".join(parts)
    farther = farther_after_training(list(models.values()))
    return [*farther, *([f"{line[0].upper()}{line[1:]}."] if line else [])]


_FIGURES: tuple[tuple[str, str, Callable[[ModelResult], str]], ...] = (
    ("top-1 agreement", "untrained", lambda m: text.percent(m.fidelity.top1_agreement, 1)),
    ("KL to the teacher, nats/token", "untrained", lambda m: text.tiny(m.fidelity.kl)),
    ("held-out perplexity", "teacher", lambda m: text.digits(m.fidelity.perplexity)),
    ("parameters", "teacher", lambda m: text.count(m.parameters)),
    ("decoding, tokens/s", "teacher",
     lambda m: text.digits(m.speed.decode_tokens_per_s) if m.speed else ""),
)  # fmt: skip
"""A figure's name, the model to compare the student with, and how to show either's value."""
_FOLDED_FIGURES: tuple[tuple[str, str, Callable[[ModelResult], str]], ...] = (
    ("top-1 agreement, shared roots", *_FIGURES[0][1:]),
    ("KL to the teacher, shared roots, nats/token", *_FIGURES[1][1:]),
    ("held-out bits per byte", "teacher",
     lambda m: text.digits(m.fidelity.bits_per_byte) if m.fidelity.bits_per_byte else ""),
    *_FIGURES[3:],
)  # fmt: skip
"""The figures for a teacher with a different tokenizer."""


def _figures(run: RunFacts, models: Mapping[str, ModelResult]) -> Iterator[Figure]:
    student = models["student"]
    folded = student.fidelity.compared is not None
    for name, role, show in _FOLDED_FIGURES if folded else _FIGURES:
        other = models.get(role)
        remark = show(other) if other else ""
        if show(student):
            yield Figure(show(student), name, f"{role}: {remark}" if remark else "")
    total = sum(stage.cost.seconds for stage in run.stages)
    yield Figure(text.seconds(total), "total", f"{len(run.stages)} stages")


# --- measurements ------------------------------------------------------------------------------


def size_chart(models: Sequence[ModelResult]) -> Chart:
    """Chart KL to the teacher against parameters; closer to the bottom left is better."""
    sizes, label = in_units([model.parameters for model in models], "parameters")
    dots = [
        dot(role_name(m.role), x, m.fidelity.kl, role_color(m.role),
            may_be_cut=m.role == "untrained")
        for m, x in zip(models, sizes, strict=True)
    ]  # fmt: skip
    return LineChart("Quality against size", label, KL_LABEL, dots)


def speed_charts(models: Sequence[ModelResult]) -> list[Chart]:
    """Chart top-1 agreement against decoding speed; closer to the top right is better."""
    dots = [
        dot(role_name(m.role), m.speed.decode_tokens_per_s, 100 * m.fidelity.top1_agreement,
            role_color(m.role))
        for m in models
        if m.speed is not None
    ]  # fmt: skip
    if len(dots) < 2:
        return []
    x_label, y_label = "decoding speed (tokens/s)", "top-1 agreement (%)"
    return [LineChart("Quality against speed", x_label, y_label, dots)]


# --- costs, student, exports -------------------------------------------------------------------


def _scratch_part(run: RunFacts, student: Mapping[str, Any]) -> Section:
    """Compare this run with training the student from scratch, by the counting rules of
    `stillhouse.account`."""
    title = "Compared with training the student from scratch"
    trained, made = run.cost("train"), run.cost("student")
    parameters = student.get("parameters", {}).get("active")
    if trained is None or not trained.tokens or not parameters:
        return Section(title)
    same, tokens = account.training_flops(parameters, trained.tokens), trained.tokens
    rows = [
        ("This distillation", tokens, trained.flops + (made.flops if made else 0)),
        ("From scratch, same tokens", tokens, same),
    ]
    optimal = OPTIMAL_TOKENS * parameters
    if optimal > tokens:
        name = f"From scratch, {OPTIMAL_TOKENS} tokens/parameter"
        rows.append((name, optimal, account.training_flops(parameters, optimal)))
    table = MetricsTable.of_text(
        ["Training", "Tokens", "FLOPs"],
        [(name, text.count(tokens), text.flops(flops)) for name, tokens, flops in rows],
    )
    small = (
        "Counted, not measured: 6 FLOPs per parameter and training token, 2 per parameter and "
        "forward-only token. Training from scratch on the same tokens saves the teacher’s share; "
        "the quality it would reach was not measured. 20 tokens/parameter is the compute-optimal "
        "rule of thumb (Hoffmann et al. 2022, arXiv 2203.15556)."
    )
    return Section(title, table=table, small=small)


def student_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts in the summary and its parts (such as pruning); empty ones are left out."""
    facts = []
    for key, value in summary.items():
        if key == "notes" or value in (None, [], {}, ()):
            continue
        if key.endswith("parameters") and isinstance(value, dict):
            facts.append((text.label(key), text.describe(value.get("total"))))
        elif isinstance(value, dict):
            facts += student_facts(value)
        elif key in ("ffn_size", "layers") and isinstance(value, list | tuple):
            facts.append((text.label(key), " → ".join(text.describe(size) for size in value)))
        else:
            facts.append((text.label(key), text.describe(value)))
    return facts


def _student_notes(summary: Mapping[str, Any]) -> list[str]:
    parts = [summary, *(part for part in summary.values() if isinstance(part, dict))]
    return [str(note) for part in parts for note in part.get("notes", [])]


def _export_section(models: Mapping[str, ModelResult], replays: Replays) -> Section:
    """Build the section that compares each export with the checkpoint, with all forms of the model
    and the replayed prompts."""
    heads = ["Format", "Number type", "Size", "Top-1 agreement", "KL (nats/token)", "KL limit",
             "KL in llama.cpp"]  # fmt: skip
    lead = (
        "Each export, loaded in a fresh process without Stillhouse and compared with the trained "
        "checkpoint on held-out text."
    )
    rows = [_export_row(replay) for replay in replays]
    return Section(
        "Exports, replayed",
        "export",
        lead=lead,
        table=MetricsTable.of_text(heads, rows) if rows else None,
        parts=filled(
            forms_section(forms(models, replays)),
            Section("Prompts, replayed", texts=[*_replayed_texts(replays)]),
        ),
    )


def _export_row(replay: Mapping[str, Any]) -> list[str]:
    llama = replay.get("llama_cpp")
    return [
        str(replay["format"]),
        str(replay["dtype"]),
        text.size(float(replay["bytes"])),
        text.percent(float(replay["top1_agreement"]), 1),
        text.tiny(float(replay["kl"])),
        text.tiny(float(replay["kl_limit"])),
        text.tiny(float(llama["kl"])) if llama else text.DASH,
    ]


def _replayed_texts(replays: Replays) -> Iterator[SideBySide]:
    """Yield each prompt with the continuations by the checkpoint and every export."""
    for texts in zip(*(replay["texts"] for replay in replays), strict=True):
        answers = [Answer("Trained checkpoint", texts[0]["source"], MUTED)]
        for replay, answer in zip(replays, texts, strict=True):
            answers.append(Answer(replay["format"], answer["exported"], ACCENT))
        yield SideBySide(texts[0]["prompt"], answers)
