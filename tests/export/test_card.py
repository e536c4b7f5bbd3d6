"""The model card states where a student comes from, and warns of licenses that restrict it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.results import Evaluation, Fidelity, ModelResult
from stillhouse.export.gate import ReplayResult
from stillhouse.export.licenses import (
    TEACHER,
    License,
    Origin,
    find_license,
    license_lines,
    license_warning,
)
from stillhouse.export.model_card import ModelCard, write_language_model_card

PERMISSIVE = License("apache-2.0")


def card_of(license_: License = PERMISSIVE, *others: Origin) -> ModelCard:
    def result(role: str, kl: float) -> ModelResult:
        return ModelResult(
            role, 1_000_000, 800_000, 2_000_000, Fidelity(10 + kl, kl, 0.9, 0.1, 512)
        )

    evaluation = Evaluation([result("teacher", 0), result("student", 0.25)], [])
    return ModelCard(
        name="small",
        pipeline="text-generation",
        about=["A student distilled from org/large."],
        metrics=metrics_of(evaluation),
        origins=[Origin(TEACHER, "org/large (commit 0123)", license_), *others],
        data="1,000 training tokens from corpus python-reference",
        recipe="name: small\n",
        hashes={"teacher": "abc"},
    )


REPLAY = ReplayResult("gguf-q8_0", "q8_0", 0.001, 0.02, 0.98, 256, 1_000, [], ["a note"])


def test_a_card_contains_the_teacher_the_metrics_the_data_the_recipe_and_hashes(
    tmp_path: Path,
) -> None:
    (tmp_path / "small.gguf").write_bytes(b"weights")
    write_language_model_card(tmp_path, card_of(), REPLAY)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "org/large"
    assert head["library_name"] == "gguf"
    for row in (
        "| KL to the teacher (nats/token) | 0 | 0.250 |",
        "| Top-1 agreement | 90.0% | 90.0% |",
        "| Perplexity, held-out text | 10.00 | 10.25 (98% of teacher) |",
        "| Parameters | 1.000M | 1.000M (100% of teacher) |",
        "| Size on disk | 2.00 MB | 2.00 MB (100% of teacher) |",
    ):
        assert row in card
    assert "| teacher | abc |" in card
    assert f"| small.gguf | {hashlib.sha256(b'weights').hexdigest()} |" in card
    for part in ("1,000 training tokens", "name: small", "- a note", "differs", "98.0%"):
        assert part in card
    assert "Warning" not in card


@pytest.mark.parametrize(
    ("license_", "word"),
    [
        ("llama2", "forbids"),
        ("llama3", "forbids"),
        ("llama-3", "forbids"),
        ("Meta Llama 3 Community License", "forbids"),
        ("llama3.2", "Built with Llama"),
        ("Llama 3.1 Community License", "allows students of any kind"),
        ("llama4", "allows students of any kind"),
        ("llama", "is unknown"),
        ("gemma", "passed on"),
        ("cc-by-nc-4.0", "commercial"),
        ("fair-noncommercial-research-license", "commercial"),
        ("apple-amlr", "for research"),
        ("qwen-research", "for research"),
        ("intel-research", "for research"),
        ("tongyi-qianwen", "Built with Qwen"),
        ("openrail", "passed on"),
        ("cc-by-nd-4.0", "modified versions"),
        ("gpl-3.0", "same license"),
        ("proprietary", "check it before you share"),
        ("a license that nobody knows", "check it before you share"),
        ("other", "its own license"),
        ("unknown", "look it up"),
    ],
)
def test_a_license_that_restricts_students_has_a_warning(
    tmp_path: Path, license_: str, word: str
) -> None:
    assert word in str(license_warning(license_))
    write_language_model_card(tmp_path, card_of(License(license_)), REPLAY)
    assert f"**{license_}**. Warning: " in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "license_",
    [
        "apache-2.0",
        "Apache License, Version 2.0",
        "mit",
        "MIT License",
        "bsd-3-clause",
        "isc",
        "cc0-1.0",
        "CC BY 4.0",
        "unlicense",
    ],
)
def test_a_permissive_license_has_no_warning(license_: str) -> None:
    assert license_warning(license_) is None


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: llama3.2\n---\n# Large", "llama3.2"),
        ("---\ntags: [x]\n---\n", "unknown"),
        ("---\n: [\n---\n", "unknown"),
        ("# Large\n", "unknown"),
    ],
)
def test_the_license_is_read_from_the_teachers_card(
    tmp_path: Path, card: str, license_: str
) -> None:
    assert find_license(None, tmp_path).shown == "unknown"
    (tmp_path / "README.md").write_text(card)
    assert find_license(None, tmp_path).shown == license_
    assert find_license("mit", tmp_path).shown == "mit"


def test_a_custom_license_keeps_its_name_and_link(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: apple-amlr\nlicense_link: LICENSE\n---\n"
    )
    found = find_license(None, tmp_path)
    write_language_model_card(tmp_path, card_of(found), REPLAY)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "other"
    assert head["license_name"] == "apple-amlr"
    assert head["license_link"] == "LICENSE"
    assert "**apple-amlr**. Warning: this license is for research" in card


@pytest.mark.parametrize(
    ("stated", "head"),
    [
        ("llama3.2", {"license": "llama3.2"}),
        ("MIT License", {"license": "mit"}),
        ("Apache License, Version 2.0", {"license": "apache-2.0"}),
        ("OpenAI's terms of use", {"license": "other", "license_name": "openai-s-terms-of-use"}),
        ("apache-2.0, gpl-3.0", {"license": "other", "license_name": "apache-2.0-gpl-3.0"}),
    ],
)
def test_the_cards_metadata_has_a_license_that_the_hub_accepts(
    stated: str, head: dict[str, str]
) -> None:
    assert License(stated).head == head


def test_a_card_lists_every_model_that_was_used_with_its_license(tmp_path: Path) -> None:
    start = Origin("The student's start", "meta/small (commit 4567)", License("llama3.2"))
    write_language_model_card(tmp_path, card_of(PERMISSIVE, start), REPLAY)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == ["org/large", "meta/small"]
    assert head["license"] == "llama3.2", "the license that restricts the student"
    assert "The student's start, meta/small (commit 4567): **llama3.2**. Warning: Meta" in card
    teacher = Origin("Another teacher", "google/large (commit 89)", License("gemma"))
    write_language_model_card(tmp_path, card_of(PERMISSIVE, start, teacher), REPLAY)
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert head["license"] == "other", "two licenses restrict the student"
    warned = [line.text.split(":")[0] for line in license_lines([start, teacher])]
    assert warned == [
        "The student's start, meta/small (commit 4567)",
        "Another teacher, google/large (commit 89)",
    ]


def test_names_labels_and_paths_are_plain_text_in_a_card(tmp_path: Path) -> None:
    teacher = Origin(TEACHER, "org/<b>large</b> [x](http://y)", License("my *own*\n---\nlicense"))
    card = replace(
        card_of(),
        name="small <script>",
        origins=[teacher],
        about=["Labels: <img src=x onerror=alert(1)>, **bold**, a|b, line\n# heading, \x1b[31m."],
        data="texts/my_<i>data</i>.csv",
        recipe="prompt: |\n  ```\n  # no heading\n",
    )
    write_language_model_card(tmp_path, card, REPLAY)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license_name"] == "my-own"
    assert "Labels: \\<img src=x onerror=alert(1)\\>, \\*\\*bold\\*\\*, a\\|b, line # head" in body
    assert "texts/my\\_\\<i\\>data\\</i\\>.csv" in body
    assert "\x1b" not in body
    assert "<" not in body.replace("\\<", "")
    assert "````yaml\nprompt: |\n  ```\n  # no heading\n````" in body
