"""Models are measured on text that they generate themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.config.load_recipe import parse_recipe
from stillhouse.evaluation.evaluate import evaluate, evaluate_models
from stillhouse.evaluation.evaluate_config import EvaluateRecipe, OwnTextRecipe
from stillhouse.evaluation.own_answers import OwnAnswers, far_on_own_text
from stillhouse.evaluation.results import Evaluation
from stillhouse.generation.own_text import answer_states, own_text_sums, score_tokens
from stillhouse.generation.own_text import own_text as means
from stillhouse.generation.own_text_figures import OwnText
from stillhouse.hardware import Precision
from stillhouse.language_model.recipe import Recipe

from .toys import VOCABULARY, random_documents, save_toy, toy_model, toy_tokenizer, window

FLOAT32 = Precision(torch.float32, "float32, for the test")
WINDOWS = [window(random_documents(seed, 14, 18)) for seed in range(4)]
OWN = OwnText(0.4, 0.5, 1.0, -2.0, 10.0, 0.0, 0.0, 4, 40)


def measured(folder: Path, own_text: OwnTextRecipe | None, **more: Any) -> Evaluation:
    paths = {
        "teacher": save_toy(folder / "teacher", toy_model(0)),
        "untrained": save_toy(folder / "untrained", toy_model(0)),
        "student": save_toy(folder / "student", toy_model(1, layers=1)),
    }
    return evaluate(
        paths,
        section=EvaluateRecipe(speed=False, own_text=own_text),
        windows=WINDOWS,
        seed=3,
        vocabulary=VOCABULARY,
        precision=FLOAT32,
        **more,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    section = OwnTextRecipe(answers=5, max_tokens=20, temperature=1.0)
    return measured(tmp_path_factory.mktemp("own"), section)


def test_the_metrics_are_those_of_each_model_alone(found: Evaluation) -> None:
    section = OwnTextRecipe(answers=5, max_tokens=20, temperature=1.0)
    student, teacher = toy_model(1, layers=1), toy_model(0)
    own = OwnAnswers.planned(section, toy_tokenizer(), WINDOWS, 3)
    assert own is not None
    own.add("student", student)
    answers = own.answers["student"]
    assert len(answers) == 5
    states = answer_states(student, answers), answer_states(teacher, answers)
    scores = score_tokens(answers, *states, VOCABULARY)
    result = found.result("student")
    assert result is not None
    assert result.own_text == means(own_text_sums(answers, scores))


def test_a_model_that_equals_the_teacher_has_its_metrics_and_no_kl(found: Evaluation) -> None:
    teacher, same = found.result("teacher"), found.result("untrained")
    assert teacher is not None
    assert same is not None
    assert teacher.own_text == same.own_text
    assert teacher.own_text is not None
    assert teacher.own_text.forward_kl == teacher.own_text.reverse_kl == 0


def test_three_answers_are_kept_token_by_token(found: Evaluation) -> None:
    assert len(found.scored_answers) == 3
    for one in found.scored_answers:
        assert list(one.answers) == ["teacher", "untrained", "student"]
        for role, answer in one.answers.items():
            lengths = {len(v) for v in vars(answer).values()}
            assert len(lengths) == 1
            assert 1 <= lengths.pop() <= 20
            reverse_kl = [kl for kl in answer.reverse_kl if kl is not None]
            assert len(reverse_kl) == len(answer.reverse_kl)
            assert (max(reverse_kl) > 0) == (role == "student")


def test_the_table_and_the_notes_contain_the_metrics(found: Evaluation) -> None:
    text = repr(found)
    assert "KL on own text, model ‖ teacher" in text
    assert "answers to 5 prompts from the held-out text, at most 20 tokens" in text


def test_results_are_loaded_as_they_were_saved(found: Evaluation, tmp_path: Path) -> None:
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found


def test_prompts_of_the_recipe_are_all_answered(tmp_path: Path) -> None:
    section = OwnTextRecipe(prompts=["the cat", "a dog sat"], answers=1, max_tokens=4)
    found = measured(tmp_path, section)
    assert [one.prompt.strip() for one in found.scored_answers] == ["the cat", "a dog sat"]


def test_prompts_that_fill_the_context_are_left_out_with_a_note(tmp_path: Path) -> None:
    """The models' context is 256 tokens."""
    section = OwnTextRecipe(prompts=["the cat", "dog " * 300], max_tokens=4)
    (note,) = (one for one in measured(tmp_path, section).notes if "Own text" in one)
    assert "answers to 1 prompt, at most 4 tokens each, greedy" in note
    assert note.endswith(" 1 more left out because they fill the context.")


@pytest.mark.parametrize("section", [None, OwnTextRecipe(answers=0)])
def test_own_text_is_measured_only_on_request(
    section: OwnTextRecipe | None, tmp_path: Path
) -> None:
    found = measured(tmp_path, section)
    assert {model.own_text for model in found.models} == {None}
    assert not found.scored_answers
    assert "own text" not in repr(found).lower()


def test_models_in_memory_are_measured_on_own_text() -> None:
    models = {"teacher": toy_model(0), "student": toy_model(1, layers=1)}
    found = evaluate_models(models, toy_tokenizer(), WINDOWS, vocabulary=VOCABULARY, own_text=4)
    student = found.result("student")
    assert student is not None
    assert student.own_text is not None
    assert student.own_text.answers == 4


def test_a_student_far_from_its_teacher_on_its_own_text_is_reported() -> None:
    assert far_on_own_text(0.2, OWN) == []
    assert far_on_own_text(0.0, OWN) == []
    (note,) = far_on_own_text(0.1, replace(OWN, forward_kl=0.35))
    assert "0.35 nats/token, 3.5 times" in note


def test_a_recipe_whose_student_learns_from_its_own_text_measures_it() -> None:
    raw: dict[str, Any] = {
        "name": "a",
        "teacher": {"model": "m"},
        "data": {"sources": [{"kind": "text", "path": "a.txt"}]},
        "student": {"start": "random"},
    }

    def measured(train: dict[str, Any], evaluate: dict[str, Any]) -> OwnTextRecipe | None:
        recipe = parse_recipe({**raw, "train": train, "evaluate": evaluate})
        assert isinstance(recipe, Recipe)
        return recipe.measured.own_text

    given = {"own_text": {"answers": 3}}
    assert measured({}, {}) is None
    assert measured({"on_policy": {}}, {}) == OwnTextRecipe()
    assert measured({"on_policy": {"share": 0.0}}, {}) is None
    assert measured({"on_policy": {}}, given) == OwnTextRecipe(answers=3)
