"""The names that a recipe accepts are those that are implemented."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args

import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import SchedulerType

import stillhouse
from stillhouse.export import gguf_file
from stillhouse.export.export_formats import COMPRESSED, GGUF
from stillhouse.objectives.divergences import DIVERGENCES
from stillhouse.objectives.objective_names import PARAMETERS
from stillhouse.objectives.triton_dispatch import KINDS
from stillhouse.pruning.depth import SCORES
from stillhouse.pruning.pruning_config import UNITS, DepthImportance, TargetRecipe
from stillhouse.pruning.sizes import AXES, Sizes
from stillhouse.section import OneOf
from stillhouse.signals.encode import ENCODERS
from stillhouse.signals.encodings import ENCODINGS, AnswerChunks, EntryEncoding
from stillhouse.signals.signals_config import EntrySignals, SignalEncoding
from stillhouse.students.student_config import PrunedSizes
from stillhouse.training.train_config import SCHEDULES


def test_names_in_a_registry_are_validated_like_a_literal() -> None:
    adapter = TypeAdapter(Annotated[str, OneOf({"one": 1, "two": 2})])
    assert adapter.json_schema() == {"enum": ["one", "two"], "type": "string"}
    assert adapter.validate_python("two") == "two"
    with pytest.raises(ValidationError, match="Input should be 'one' or 'two'"):
        adapter.validate_python("three")


def test_every_divergence_has_a_formula() -> None:
    assert DIVERGENCES.keys() | {"cross_entropy"} == PARAMETERS.keys()
    assert set(KINDS) <= DIVERGENCES.keys()
    assert all(len(PARAMETERS[name]) <= 1 for name in KINDS)


def test_every_encoding_has_an_encoder_and_a_section() -> None:
    assert set(ENCODERS) == set(get_args(EntryEncoding))
    sections = get_args(get_args(SignalEncoding)[0])
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in sections}
    assert kinds | {AnswerChunks.kind} == ENCODINGS.keys()  # `signals.answers` selects it
    for section in get_args(EntrySignals):
        (kind,) = get_args(section.model_fields["kind"].annotation)
        assert section(kind=kind).encoding().kind == kind


def test_every_axis_and_target_has_a_key() -> None:
    assert set(AXES) == PrunedSizes.model_fields.keys() - {"hidden_method", "target"}
    assert set(AXES) <= {one.name for one in fields(Sizes)}
    assert UNITS.keys() == TargetRecipe.model_fields.keys()


def test_every_depth_importance_is_a_score_a_trial_or_a_gradient() -> None:
    assert set(get_args(DepthImportance)) == {"kl", "gradients", *SCORES}


def test_every_schedule_is_one_of_transformers() -> None:
    assert set(SCHEDULES.values()) <= {one.value for one in SchedulerType}


def test_every_format_has_a_writer() -> None:
    assert gguf_file.FORMATS.keys() == GGUF.keys()
    # The script runs in llm-compressor's environment and cannot be imported here.
    script = Path(stillhouse.__file__).parent / "export" / "llm_compressor.py"
    (schemes,) = (
        node.value
        for node in ast.parse(script.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCHEMES"
    )
    assert ast.literal_eval(schemes).keys() == COMPRESSED.keys()


def test_a_recipe_is_read_without_torch() -> None:
    code = (
        "import sys, stillhouse.config.load_recipe as load; load.recipe_json_schema(); "
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
