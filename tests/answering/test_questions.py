"""The prompts of a task's teacher, and what its student learns from the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.answering.answering_job import find_answering, training_recipe
from stillhouse.check import check_recipe
from stillhouse.errors import RecipeError
from stillhouse.generation.generation_config import VllmTeacher
from stillhouse.generation.text_teacher import LocalText
from stillhouse.objectives.objective_config import LogitsTerm
from tests.answering import toys

EXAMPLES = {"examples": [{"text": "Ann is 3.", "answer": "Ann"}]}


def parsed(folder: Path, **sections: Any) -> AnsweringRecipe:
    return toys.parsed(toys.clean(toys.recipe(folder, "generate", **sections)))


@pytest.mark.parametrize(
    ("task", "alone"),
    [
        ({}, False),
        ({**EXAMPLES, "student_sees": "all"}, False),
        (EXAMPLES, True),
        ({"system": "Be brief."}, False),
        ({"system": "Be brief.", "student_sees": "prompt"}, True),
    ],
    ids=["a prompt", "all is seen", "examples", "system is seen", "system"],
)
def test_only_text_is_learned_from_a_teacher_with_a_longer_prompt(
    tmp_path: Path, task: dict[str, Any], alone: bool
) -> None:
    recipe = parsed(tmp_path, task=task)
    trained = training_recipe(recipe, tmp_path)
    (term,) = trained.objective.terms
    assert isinstance(term, LogitsTerm)
    assert (term.divergence == "cross_entropy") == alone == recipe.learns_text_alone
    # The pruned student is still derived from the teacher.
    assert trained.teacher.model == str(tmp_path / "teacher")


def test_check_warns_if_distributions_would_be_computed_without_the_examples(
    tmp_path: Path,
) -> None:
    objective = {"terms": [{"divergence": "forward_kl"}]}
    recipe = parsed(tmp_path, task=EXAMPLES, objective=objective)
    told = check_recipe(recipe, base=tmp_path)
    warned = [one.text for one in told if one.level == "warning"]
    assert any("without its examples" in text for text in warned)


def test_a_local_model_can_answer_in_vllm(tmp_path: Path) -> None:
    recipe = parsed(tmp_path, teacher={"vllm": {"tensor_parallel": 2, "context": 512}})
    source = find_answering(recipe, tmp_path).source()
    assert isinstance(source, LocalText)
    assert isinstance(source.own, VllmTeacher)
    assert source.source.path == tmp_path / "teacher"
    assert (source.own.tensor_parallel, source.own.context) == (2, 512)
    told = check_recipe(recipe, base=tmp_path)
    errors = {one.topic for one in told if one.level == "error"}
    assert errors == {"vLLM"}


def test_vllm_cannot_be_combined_with_an_api(tmp_path: Path) -> None:
    sections = toys.api(tmp_path, "http://x/v1")
    sections["teacher"]["vllm"] = {}
    with pytest.raises(RecipeError, match="vllm runs a local model"):
        parsed(tmp_path, **sections)
