"""The model card says where a student comes from, and warns where its teacher's license does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from stillhouse.evaluate import Evaluation, Fidelity, ModelResult
from stillhouse.export import (
    CardFacts,
    ReplayResult,
    license_warning,
    teacher_license,
    write_card,
)


def facts(**changes: str) -> CardFacts:
    def result(role: str, kl: float) -> ModelResult:
        return ModelResult(
            role, 1_000_000, 800_000, 2_000_000, Fidelity(10 + kl, kl, 0.9, 0.1, 512)
        )

    evaluation = Evaluation([result("teacher", 0), result("student", 0.25)], [])
    plain = {
        "name": "small",
        "teacher": "org/large (commit 0123)",
        "license": "apache-2.0",
        "data": "1,000 training tokens from corpus python-reference",
        "recipe": "name: small\n",
    }
    return CardFacts(**{**plain, **changes}, hashes={"teacher": "abc"}, evaluation=evaluation)


REPLAY = ReplayResult("gguf-q8_0", "q8_0", 0.001, 0.02, 0.98, 256, 1_000, [], ["a note"])


def test_a_card_names_teacher_data_recipe_hashes_and_what_was_kept(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"weights")
    write_card(tmp_path, facts(), REPLAY)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "org/large"
    assert head["library_name"] == "gguf"
    assert "| student | 0.250 | 90.0% | 10.25 (98%) | 1.0 M | 2.0 MB |" in card
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
        ("llama3.2", "Built with Llama"),
        ("gemma", "passed on"),
        ("cc-by-nc-4.0", "commercial"),
        ("other", "of its own"),
        ("unknown", "look it up"),
    ],
)
def test_licenses_that_restrict_students_are_warned_of(
    tmp_path: Path, license_: str, word: str
) -> None:
    assert word in str(license_warning(license_))
    write_card(tmp_path, facts(license=license_), REPLAY)
    assert f"**{license_}**. Warning: " in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("license_", ["apache-2.0", "mit", "bsd-3-clause"])
def test_free_licenses_are_not(license_: str) -> None:
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
    assert teacher_license(None, tmp_path) == "unknown"
    (tmp_path / "README.md").write_text(card)
    assert teacher_license(None, tmp_path) == license_
    assert teacher_license("mit", tmp_path) == "mit"
