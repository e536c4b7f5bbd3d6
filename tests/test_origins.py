"""The licenses of all models in a run are checked and shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stillhouse.check import check_recipe
from stillhouse.commands import run
from stillhouse.commands import run as run_cascade
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.language_model.job import find_models
from stillhouse.language_model.model_origins import origins_of
from tests import tiny

pytestmark = pytest.mark.run


def licensed(folder: Path, license_: str, seed: int = 1) -> str:
    tiny.save_model(folder, seed=seed)
    (folder / "README.md").write_text(f"---\nlicense: {license_}\n---\n")
    return str(folder)


def test_check_warns_of_the_licenses_of_all_models_of_a_run(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    raw["student"] = {"start": "pretrained", "model": licensed(tmp_path / "start", "gemma")}
    other = licensed(tmp_path / "other", "cc-by-nc-4.0", seed=2)
    raw["train"]["teachers"] = ["teacher", other]
    raw["data"]["sources"].append({"kind": "jsonl", "path": str(tmp_path / "made.jsonl")})
    raw["synthesize"] = {
        "teacher": {"api": {"base_url": "http://127.0.0.1:9/v1", "model": "big"}},
        "prompts": {"path": str(tmp_path / "text.txt")},
        "out": str(tmp_path / "made.jsonl"),
        "budget": {"max_tokens": 1000},
    }
    found = origins_of(find_models(tiny.parsed(raw), tmp_path))
    assert [(one.part, one.license.id) for one in found] == [
        ("The teacher", "apache-2.0"),
        ("The student's start", "gemma"),
        ("Another teacher", "cc-by-nc-4.0"),
        ("The text's teacher", "the provider's terms"),
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    warned = [one.text for one in check_recipe(path) if one.topic == "license"]
    assert len(warned) == 3
    assert "must be passed on" in warned[0]


def test_a_later_member_inherits_the_license_of_the_start_model(tmp_path: Path) -> None:
    raw = tiny.recipe(
        tmp_path, cascade={"hops": [{"name": "a", "layers": 2}, {"name": "b", "layers": 1}]}
    )
    raw["cascade"]["teacher"] = "both"
    raw["student"] |= {"ffn_size": None, "model": licensed(tmp_path / "start", "gemma")}
    result = run_cascade(parse_recipe(raw), base=tmp_path)
    assert result is not None
    for member in result.members.values():
        card = (member.model / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["license"] == "gemma"
        assert "Another teacher" not in card, "the previous member is not another teacher"


def test_a_teacher_with_a_cut_vocabulary_keeps_its_license(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    del raw["teacher"]["license"]
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    raw["student"] |= {"vocabulary": "data"}
    result = run(parse_recipe(raw), base=tmp_path)
    assert result is not None
    assert "**llama3.2**. Warning" in (result.model / "README.md").read_text()
