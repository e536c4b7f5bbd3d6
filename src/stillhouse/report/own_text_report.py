"""The report's section on the models' own answers: training curves, and tokens colored by KL."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from stillhouse.evaluation.results import ScoredAnswer, ScoredAnswers, role_name, role_order
from stillhouse.report.charts import ACCENT, SECOND, Line, LineChart, in_units, role_color
from stillhouse.report.history import Rows, series_of_windows, smooth
from stillhouse.report.page import Answer, Section, SideBySide, Token

LEVELS = (0.1, 0.3, 1.0, 3.0)
"""KL in nats at which each next color starts."""

_LEAD = (
    "Each model answers the same prompts. A token’s color shows KL(model ‖ teacher) at that token: "
    "it is dark where the model is likely to write what its teacher would not. Every token is "
    "scored as a continuation of the model’s own text. The teacher’s answer has no color. Hover "
    "over a token to see its figures."
)
_CURVES = (
    (("own_forward_kl", "own_reverse_kl", "own_jsd"), "Divergence on own text",
     "nats/token"),
    (("own_entropy",), "Entropy on own text", "nats/token"),
    (("own_teacher_logprob",), "Teacher’s log-probability of own text", "nats/token"),
    (("own_repetition", "own_cut_off"), "Repetition and truncated answers", "share"),
    (("own_length",), "Length of own answers", "tokens"),
)  # fmt: skip
"""The keys of metrics.jsonl on each chart, the chart's title, and the unit."""
_LABELS = {
    "own_forward_kl": "KL(teacher ‖ student)",
    "own_reverse_kl": "KL(student ‖ teacher)",
    "own_jsd": "JSD",
    "own_repetition": "4-grams seen before",
    "own_cut_off": "truncated answers",
}
_COLORS = (ACCENT, SECOND, *map(role_color, ("quantized", "teacher")))


def own_text_section(answers: Iterable[ScoredAnswers], history: Rows) -> Section:
    """Build the section, which is empty if neither answers nor curves were measured."""
    texts = [
        SideBySide(
            one.prompt,
            [
                Answer(role_name(role), "", role_color(role), _tokens(one.answers[role]))
                for role in sorted(one.answers, key=role_order)
            ],
        )
        for one in answers
    ]
    charts = own_text_charts(history)
    return Section(
        "Own answers",
        "own-text",
        lead=_LEAD if texts else "",
        legend=_legend() if texts else [],
        texts=texts,
        parts=[Section("During training", charts=[*charts])] if charts else [],
    )


def _tokens(answer: ScoredAnswer) -> list[Token]:
    columns = (answer.texts, answer.forward_kl, answer.reverse_kl, answer.teacher_logprob)
    tokens = []
    for written, forward, reverse, logprob in zip(*columns, strict=True):
        if forward is None or reverse is None or logprob is None:
            tokens.append(Token(written, 0, "starts inside one of the teacher’s tokens"))
            continue
        about = (
            f"KL(model ‖ teacher) {reverse:.2f}, KL(teacher ‖ model) {forward:.2f}, "
            f"teacher’s log-probability {logprob:.2f}"
        )
        tokens.append(Token(written, sum(reverse >= limit for limit in LEVELS), about))
    return tokens


def _legend() -> list[Token]:
    limits = [f"{limit:g}" for limit in LEVELS]
    names = [f"below {limits[0]}"]
    names += [f"{low}–{high}" for low, high in pairwise(limits)]
    names += [f"{limits[-1]} nats or more"]
    return [Token(name, level) for level, name in enumerate(names)]


def own_text_charts(history: Rows) -> list[LineChart]:
    """Chart the metrics of the student's own text during training; no chart with fewer than two
    points."""
    charts = []
    for keys, title, unit in _CURVES:
        found = {key: series_of_windows(history, key) for key in keys}
        found = {key: points for key, points in found.items() if len(points[1]) >= 2}
        if not found:
            continue
        tokens, x_label = in_units([x for xs, _ in found.values() for x in xs], "training tokens")
        lines, start = [], 0
        for (key, (xs, y)), color in zip(found.items(), _COLORS, strict=False):
            x = tokens[start : start + len(xs)]
            start += len(xs)
            name = "" if len(found) == 1 else _LABELS[key]
            lines += [Line(x, y, color, style="faint"), Line(x, smooth(y), color, name)]
        lowest = min(y for line in lines for y in line.y)
        y_limits = (None if lowest < 0 else 0.0, None)
        charts.append(LineChart(title, x_label, unit, lines, x_limits=(0, None), y_limits=y_limits))
    return charts
