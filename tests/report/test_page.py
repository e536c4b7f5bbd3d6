"""The page is well-formed, works offline, escapes all text, and leaves out what has no data."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import RunError
from stillhouse.evaluation.results import Evaluation, Generation
from stillhouse.report.language_model_report import language_model_report, student_facts
from stillhouse.report.page import (
    Report,
    read_report,
    redraw_report,
    render,
    write_page,
    write_report,
)
from stillhouse.report.sections import RunFacts, cost_section
from stillhouse.runfolder import Cost, Outcome, RunFolder, StagePlan
from tests.report.conftest import finished

pytestmark = pytest.mark.run

VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADING = {"src", "href", "xlink:href", "data", "poster", "srcset", "action", "background"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects the sections, the links, the ids, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)

    def _seen(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        identity = values.get("id")
        if identity:
            self.ids.append(identity)
            if tag == "section":
                self.sections.append(identity)
        self.links += [value or "" for name, value in attrs if name in LOADING]
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_is_well_formed_and_has_every_section(report: Report) -> None:
    page = Reader(render(report))
    assert page.sections == [
        "kept",
        "generations",
        "training",
        "cost",
        "student",
        "export",
        "notes",
        "again",
    ]
    assert len(page.ids) == len(set(page.ids)), "an id is used twice"
    assert page.tags.count("svg") == 8


def test_the_page_loads_nothing(report: Report) -> None:
    html = render(report)
    page = Reader(html)
    assert all(link.startswith("#") for link in page.links), page.links
    assert {link[1:] for link in page.links} <= set(page.ids), "a link leads nowhere"
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", html)


def test_the_headline_shows_what_was_measured(report: Report) -> None:
    text = Reader(render(report)).text.replace("\u00a0", " ")
    assert (
        "The student keeps 66% of the teacher’s top-1 choices at 80% of its parameters and "
        "1.25 times its decoding speed, after 61,320 tokens of distillation." in text
    )
    assert "Before training, it kept 31%; plain fine-tuning on the same tokens keeps 61%." in text


def test_retention_is_reported_as_a_percentage_of_the_teacher(report: Report) -> None:
    text = Reader(render(report)).text.replace("\u00a0", " ")
    assert "85% of the gap closed" in text  # 1 - 0.481 / 3.14
    assert "75% of teacher" in text  # perplexity: 18.7 / 24.9
    assert "125% of teacher" in text  # decoding speed: 25 / 20


def test_costs_are_compared_with_training_from_scratch(report: Report) -> None:
    text = Reader(render(report)).text.replace("\u00a0", " ")
    assert "From scratch, same tokens61,3203.97 × 10¹³" in re.sub(r"\s*\n\s*", "", text)
    assert "From scratch, 20 tokens/parameter2.159B1.40 × 10¹⁸" in re.sub(r"\s*\n\s*", "", text)
    assert "5 min 44 s" in text  # the sum of the stages' seconds


def test_a_memory_peak_set_by_an_earlier_stage_is_shown_as_a_bound(facts: RunFacts) -> None:
    peaks = [3_000_000_000, 10_000_000_000, 10_000_000_000, 2_000_000_000]
    stages = [
        replace(facts.stages[0], cost=replace(facts.stages[0].cost, peak_memory_bytes=peak))
        for peak in peaks
    ]
    table = cost_section(stages).table
    assert table is not None
    shown = [row.cells[-1].value.replace("\u00a0", " ") for row in table.rows]
    assert shown[:-1] == ["3.00 GB", "10.0 GB", "≤ 10.0 GB", "2.00 GB"]  # then the total


ATTACK = "<script>alert('&amp;')</script> & \"quoted\" $x_1$"


def test_every_text_is_escaped(
    facts: RunFacts, parts: dict[str, Any], evaluation: Evaluation
) -> None:
    """Titles, recipes, prompts, answers, stage names (also in charts), tasks, notes, versions."""
    student = evaluation.models[2]
    hostile = replace(
        facts,
        title=ATTACK,
        created=ATTACK,
        teacher=ATTACK,
        recipe={ATTACK: [ATTACK]},
        stages=[finished(ATTACK, Cost(1.0, 2, 3))],
        machine={ATTACK: ATTACK},
        versions={ATTACK: ATTACK},
    )
    replay = {
        "format": ATTACK,
        "dtype": ATTACK,
        "kl": 0.0,
        "kl_limit": 0.0,
        "top1_agreement": 1.0,
        "bytes": 1,
        "texts": [dict.fromkeys(("prompt", "source", "exported"), ATTACK)],
        "notes": [ATTACK],
    }
    parts |= {
        "evaluation": Evaluation(
            [*evaluation.models, replace(student, role=ATTACK, tasks={ATTACK: 0.1})],
            [Generation(ATTACK, {"teacher": ATTACK, ATTACK: ATTACK})],
            [ATTACK],
        ),
        "student": {ATTACK: ATTACK},
        "replays": [replay],
        "notes": [ATTACK],
    }
    page = Reader(render(language_model_report(hostile, **parts)))
    assert "script" not in page.tags
    assert not [name for name in page.attributes if "quoted" in name]
    assert page.text.count(ATTACK) >= 15, "the text is shown literally"


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        ({"history": []}, {"training"}),
        ({"student": {}}, {"student"}),
        ({"replays": []}, {"export"}),
    ],
)
def test_a_section_without_data_is_left_out(
    facts: RunFacts, parts: dict[str, Any], missing: dict[str, Any], sections: set[str]
) -> None:
    whole = Reader(render(language_model_report(facts, **parts)))
    less = Reader(render(language_model_report(facts, **{**parts, **missing})))
    assert set(whole.sections) - set(less.sections) == sections


def test_speed_baseline_tasks_and_generations_are_left_out_if_missing(
    facts: RunFacts, parts: dict[str, Any], evaluation: Evaluation
) -> None:
    models = [replace(m, speed=None, tasks={}) for m in evaluation.models if m.role != "fine_tuned"]
    parts["replays"] = [{**replay, "teacher": None} for replay in parts["replays"]]
    parts["evaluation"] = Evaluation(models, [])
    page = Reader(render(language_model_report(facts, **parts)))
    assert "kept" in page.sections
    assert "generations" not in page.sections
    for word in ("Decoding", "Peak memory7", "fine-tun", "decoding", "piqa"):
        assert word not in page.text


def test_the_students_nested_facts_are_flattened(facts: RunFacts, parts: dict[str, Any]) -> None:
    """Facts of a part are listed with the others, empty ones are left out, and notes become notes
    of the report."""
    summary = {
        "start": "pruned",
        "parameters": {"total": 107_972_928, "active": 107_972_928},
        "pruning": {
            "ffn_size": [1536, 1024],
            "kept_layers": [0, 1, 2, 5],
            "dropped_layers": [],
            "notes": ["Layer 3 was hard to refit."],
        },
        "notes": ["The vocabulary has 3 padding rows."],
    }
    assert student_facts(summary) == [
        ("Start", "pruned"),
        ("Parameters", "107,972,928"),
        ("FFN size", "1,536 → 1,024"),
        ("Kept layers", "0–2, 5"),
    ]
    notes = language_model_report(facts, **{**parts, "student": summary}).section("notes")
    assert notes is not None
    assert {"Layer 3 was hard to refit.", "The vocabulary has 3 padding rows."} <= set(notes.items)


def test_a_report_is_the_same_after_writing_and_reading_it(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.html")
    loaded = read_report(tmp_path / "report.json")
    for part in fields(Report):
        assert getattr(loaded, part.name) == getattr(report, part.name), part.name
    assert render(loaded) == render(report), "the page depends only on the data"


def test_the_page_of_a_run_folder_can_be_redrawn(report: Report, tmp_path: Path) -> None:
    """Through the link to the stage that wrote it; in a family's folder, the family's page."""
    page = tmp_path / "stages" / "report-1" / "report.html"
    write_report(report, page)
    (tmp_path / "report.html").symlink_to(page)
    first = page.read_text(encoding="utf-8")
    page.write_text("", encoding="utf-8")
    assert redraw_report(tmp_path) == page
    assert page.read_text(encoding="utf-8") == first
    write_report(replace(report, title="a family"), tmp_path / "family.html")
    assert redraw_report(tmp_path, tmp_path / "other.html") == tmp_path / "other.html"
    assert "a family" in (tmp_path / "other.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"evaluation": 3}'])
def test_damaged_data_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match="not report data"):
        read_report(tmp_path / "report.json")


def test_changed_data_is_a_clear_error(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.html")
    file = tmp_path / "report.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    without_seal = {name: whole[name] for name in asdict(report)}
    changes = ({"headline": "twice as good"}, {"titel": whole["title"]})
    for changed in (*({**whole, **change} for change in changes), without_seal):
        file.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(RunError, match="is damaged"):
            read_report(file)


def test_redrawing_the_page_does_not_damage_its_stage(report: Report, tmp_path: Path) -> None:
    """A different version of Stillhouse may draw the page differently."""
    folder = RunFolder(tmp_path)

    def work(out: Path) -> Outcome:
        write_report(report, out / "report.html")
        (out / "report.html").write_text("as an older version draws it")
        return Outcome()

    stage = folder.stage(StagePlan("report", {}, work))
    folder.point("report.html", stage.path / "report.html")
    redraw_report(tmp_path)
    assert folder.finished(StagePlan("report", {}, work)) is not None
    assert "older" not in (tmp_path / "report.html").read_text()


def test_missing_data_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        redraw_report(tmp_path)


def test_the_old_page_is_kept_if_the_new_one_cannot_be_written(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "report.html"
    write_page(report, path)
    first = path.read_text(encoding="utf-8")
    assert first == render(report)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="disk is full"):
        write_page(replace(report, title="another"), path)
    assert path.read_text(encoding="utf-8") == first
    assert list(path.parent.iterdir()) == [path], "no partial file is left"


def test_a_path_that_cannot_be_written_is_an_error(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "report.html", tmp_path):
        with pytest.raises(RunError) as caught:
            write_page(report, path)
        assert caught.value.fix
