"""A scalar without quotes is read as its key's type, or rejected with a way to write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.config.load_recipe import load_recipe
from stillhouse.errors import RecipeError

SMALLEST = """\
name: small
teacher: {model: teacher}
data: {sources: [{kind: text, path: a.txt}]}
student: {start: random}
"""
CLASSIFY = """\
name: small
task:
  kind: classify
  labels: LABELS
teacher: {model: teacher}
data: {texts: [{path: a.csv}]}
student: {start: truncated}
"""


def read(folder: Path, text: str, *overrides: str) -> Any:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def refused(folder: Path, text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    return caught.value


NOT_NUMBERS = {
    "true": "write a number",
    "True": "write a number",
    "on": "write a number",
    "No": "write a number",
    "1:30": "write 90",
    "190:20:30": "write 685230",
    "-1:30": "write -90",
    "017": "write 15 or 17",
    "+017": "write 15 or 17",
    "-017": "write -15 or -17",
    "00": "write 0",
    "089": "write 89",
    "0x1F": "write 31",
    "0o17": "write 15",
    "0b101": "write 5",
    "1_000": "write 1000",
    "1_000.5": "write 1000.5",
    ".inf": "write a finite number",
    "-.INF": "write a finite number",
    ".NaN": "write a finite number",
    "1e999": "write a smaller number",
}


@pytest.mark.parametrize(("written", "fix"), NOT_NUMBERS.items(), ids=NOT_NUMBERS.keys())
@pytest.mark.parametrize("key", ["epochs", "max_steps"])
def test_a_number_that_yaml_versions_read_differently_is_rejected_with_a_fix(
    tmp_path: Path, written: str, fix: str, key: str
) -> None:
    error = refused(tmp_path, f"{SMALLEST}train:\n  {key}: {written}\n")
    assert error.what.startswith(f"`train.{key}`: {written} ")
    assert error.where == f"{tmp_path / 'r.yaml'}, line 6"
    assert str(error.fix).startswith(fix)
    assert "in quotes" not in str(error.fix)  # which would not make it a number
    assert refused(tmp_path, SMALLEST, f"train.{key}={written}").where == f"--set train.{key}"


@pytest.mark.parametrize(
    "written",
    ["2024-01-01", "12:30:45Z", "1,5", "1.2.3", "infinity", "NaN", "1e", "5%", "1/10", "_1", "y",
     "\u22121", "\uff11", "\u201c1\u201d", "1 e-4", "1e-4,", "0x1p-3", "++1", "0.1#x"],
)  # fmt: skip
def test_text_for_a_number_is_rejected(tmp_path: Path, written: str) -> None:
    error = refused(tmp_path, f"{SMALLEST}train: {{epochs: '{written}'}}\n")
    assert f"(it is '{written}')" in error.what


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), (".5", 0.5), ("1.", 1.0), ("1", 1.0), ("+1.5", 1.5),
     ("'3e-4'", 3e-4), ("1.0e-2", 0.01), ("0.10", 0.1)],
)  # fmt: skip
def test_decimal_numbers_are_read_as_numbers(tmp_path: Path, written: str, value: float) -> None:
    recipe = read(tmp_path, f"{SMALLEST}train: {{learning_rate: {written}}}\n")
    assert recipe.train.learning_rate == value


def test_a_float_for_an_integer_key_is_reported_as_a_float(tmp_path: Path) -> None:
    assert refused(tmp_path, f"{SMALLEST}train: {{max_steps: 1e5}}\n").fix == "write 100000"
    assert "valid integer" in refused(tmp_path, f"{SMALLEST}train: {{max_steps: 1.5}}\n").what


@pytest.mark.parametrize(
    "written", ["no", "yes", "On", "1.0", "017", "1:30", "2024-01-01", "1_0", ".inf", "0x1F", "1e5"]
)
def test_scalars_for_text_are_kept_as_written(tmp_path: Path, written: str) -> None:
    recipe = read(tmp_path, f"{SMALLEST}evaluate: {{prompts: [{written}]}}\n", f"folder={written}")
    assert recipe.evaluate.prompts == [written]
    assert recipe.folder == written


def test_the_revision_of_a_model_is_not_a_number(tmp_path: Path) -> None:
    """As numbers, hashes such as 12e4567 and versions such as 1.10 would lose their spelling."""
    recipe = read(tmp_path, SMALLEST.replace("{model: teacher}", "{model: m, revision: 1.10}"))
    assert recipe.teacher.revision == "1.10"


def test_yaml_1_1_booleans_are_booleans_if_only_those_fit(tmp_path: Path) -> None:
    assert read(tmp_path, f"{SMALLEST}evaluate: {{speed: off}}\n").evaluate.speed is False
    assert read(tmp_path, SMALLEST, "evaluate.speed=No").evaluate.speed is False
    assert "`evaluate.speed`" in refused(tmp_path, SMALLEST, "evaluate.speed=1").what
    assert "`evaluate.speed`" in refused(tmp_path, SMALLEST, "evaluate.speed='no'").what


@pytest.mark.parametrize("written", ["on", "017", "1:30", ".inf", "1_000"])
def test_ambiguous_values_are_rejected_if_any_type_fits(tmp_path: Path, written: str) -> None:
    """Written in quotes, as the error suggests, they are text."""
    text = SMALLEST.replace("random}", f"random, overrides: {{hidden_act: {written}}}}}")
    error = refused(tmp_path, text)
    assert "`student.overrides.hidden_act`" in error.what
    assert f'or "{written}" in quotes' in str(error.fix)
    quoted = read(tmp_path, text.replace(f": {written}}}", f': "{written}"}}'))
    assert quoted.student.overrides == {"hidden_act": written}


def test_invisible_characters_in_a_key_are_shown(tmp_path: Path) -> None:
    """Text that is copied from a web page can contain such characters."""
    assert "`tr\\u200bain`" in refused(tmp_path, f"{SMALLEST}tr\u200bain: {{}}\n").what
    assert "`\\xa0seed`" in refused(tmp_path, f"{SMALLEST}\u00a0seed: 1\n").what


def test_json_is_yaml(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMALLEST)
    for indent in (None, 2, "\t"):
        assert read(tmp_path, json.dumps(raw, indent=indent)).name == "small"
    error = refused(tmp_path, json.dumps({**raw, "train": {"epochs": float("inf")}}))
    assert "`train.epochs`" in error.what
    assert "given twice" in refused(tmp_path, '{"name": "a", "name": "b"}').what


# --- labels ----------------------------------------------------------------------------------


def labels(folder: Path, written: str) -> dict[str, str]:
    found: dict[str, str] = read(folder, CLASSIFY.replace("LABELS", written)).task.labels
    return found


def test_labels_are_the_text_that_is_written(tmp_path: Path) -> None:
    """Country codes, answers, scores, and postal codes are neither booleans nor numbers."""
    assert list(labels(tmp_path, "[NO, SE]")) == ["NO", "SE"]
    assert list(labels(tmp_path, "[yes, no]")) == ["yes", "no"]
    assert list(labels(tmp_path, "[true, false]")) == ["true", "false"]
    assert list(labels(tmp_path, "[1, 1.0, 01, 1:30]")) == ["1", "1.0", "01", "1:30"]
    assert labels(tmp_path, "{on: switched on, off: 0}") == {"on": "switched on", "off": "0"}
    assert list(labels(tmp_path, '["null", none]')) == ["null", "none"]


@pytest.mark.parametrize("written", ["null", "~", "NULL"])
def test_a_label_that_is_null_is_rejected_with_its_line(tmp_path: Path, written: str) -> None:
    error = refused(tmp_path, CLASSIFY.replace("LABELS", f"\n    - a\n    - {written}"))
    assert error.what == f"`task.labels.1`: {written} is not text"
    assert str(error.where).endswith("line 6")
    assert error.fix == f'write it in quotes if it is text: "{written}"'
    assert list(labels(tmp_path, f'[a, "{written}"]')) == ["a", written]
