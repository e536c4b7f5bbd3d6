"""Code that comes with a model runs only where the recipe allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stillhouse.commands import run
from stillhouse.language_model.job import find_models
from tests import tiny


def loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list to which every load by transformers appends its `trust_remote_code`."""
    found: list[bool] = []

    def recorded(kind: Any) -> Any:
        real = kind.from_pretrained

        def load(*args: Any, **options: Any) -> Any:
            found.append(bool(options.get("trust_remote_code")))
            return real(*args, **options)

        return load

    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", recorded(kind))
    return found


@pytest.mark.run
@pytest.mark.parametrize("trusted", [True, False])
def test_every_load_of_a_run_follows_the_teachers_trust_remote_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    raw = tiny.recipe(tmp_path)
    raw["teacher"]["trust_remote_code"] = trusted
    found = loads(monkeypatch)
    assert run(raw, base=tmp_path) is not None
    assert len(found) > 10
    assert set(found) == {trusted}


def test_a_pretrained_student_has_its_own_trust_remote_code(tmp_path: Path) -> None:
    raw = tiny.recipe(tmp_path)
    student = tiny.save_model(tmp_path / "student", seed=1)
    raw["student"] = {"start": "pretrained", "model": str(student), "trust_remote_code": True}
    job = find_models(tiny.parsed(raw), tmp_path)
    assert not job.teacher.trusted
    assert job.start.trusted
    assert job.start.derived(tmp_path / "trained").trusted
