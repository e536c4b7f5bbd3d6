"""Recipes are read strictly. A mistake is one error with the file, the line, the key, and a fix."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.config.load_recipe import (
    load_language_model_recipe,
    load_recipe,
    parse_recipe,
    recipe_json_schema,
)
from stillhouse.errors import RecipeError
from stillhouse.section import recipe_yaml

RECIPES = Path(__file__).parents[2] / "recipes"

SMALLEST = """\
name: small
teacher:
  model: teacher
data:
  sources:
    - kind: text
      path: a.txt
student:
  start: random
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def message(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    return str(caught.value)


def test_the_smallest_recipe_gets_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALLEST))
    assert recipe.train.learning_rate == 1e-4
    assert recipe.objective.terms[0].divergence == "forward_kl"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_of_the_repository_is_valid(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_a_resolved_recipe_is_loaded_as_it_was_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, recipe_yaml(recipe))) == recipe


def test_a_task_is_rejected_by_commands_for_language_models() -> None:
    with pytest.raises(RecipeError, match="has a task"):
        load_language_model_recipe(RECIPES / "classify.yaml")


def test_the_schema_for_editors_is_the_committed_one() -> None:
    """`make schema` writes it."""
    assert json.loads((RECIPES / "recipe.schema.json").read_text()) == recipe_json_schema()


def test_an_unknown_key_names_file_line_key_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "train:\n  lerning_rate: 0.1\n")
    text = message(path)
    assert "unknown key `train.lerning_rate`" in text
    assert f"{path}, line 11" in text
    assert "did you mean `learning_rate`?" in text


def test_the_error_for_a_key_of_a_nested_section_says_where_it_belongs(tmp_path: Path) -> None:
    section = "synthesize:\n  prompts: {path: p.txt}\n  teacher: {model: some/model}\n"
    text = " ".join(message(write(tmp_path, SMALLEST + section)).split())
    assert "unknown key `synthesize.teacher.model`" in text
    assert "it is a key of `api` and `local` and `vllm`: move it there" in text
    moved = section.replace("{model: some/model}", "{local: {model: some/model}}")
    assert load_language_model_recipe(write(tmp_path, SMALLEST + moved)).synthesize is not None


def test_an_unknown_key_inside_a_list_item_names_its_index(tmp_path: Path) -> None:
    text = message(write(tmp_path, SMALLEST.replace("path: a.txt", "file: a.txt")))
    assert "data.sources.0" in text
    assert "path" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("name: small", "name: small\nseed: zero"), "`seed`: input should be a valid integer"),
        (("name: small", "name: small\nname: again"), "given twice"),
        (("start: random", "start: prunned"), "did you mean `start: pruned`"),
        (("kind: text", "kind: txt"), "did you mean `kind: text`"),
        (("  start: random", "  config: x"), "needs the key `start`"),
        (("  model: teacher", "  revision: main"), "`teacher.model` is missing"),
        (("name: small", "name: ../up"), "`name`"),
        (
            (
                "name: small",
                "name: small\nexport: {formats: [compressed-awq], importance_tokens: null}",
            ),
            "compressed-awq calibrates on text: set importance_tokens to a number",
        ),
    ],
)
def test_each_mistake_is_reported_once_and_clearly(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    assert expected in message(write(tmp_path, SMALLEST.replace(*change)))


@pytest.mark.parametrize(
    ("text", "expected"), [("a: b: c", "not valid YAML"), ("", "empty"), ("- 1", "not a mapping")]
)
def test_yaml_that_is_not_a_mapping_is_rejected(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(write(tmp_path, text))


def test_the_error_for_a_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST)
    assert "did you mean" in message(tmp_path / "rr.yaml")


def test_overrides_reach_any_depth_and_keep_their_type(tmp_path: Path) -> None:
    overrides = ["train.learning_rate=1e-5", "data.sources.0.limit=3", "evaluate.prompts=[a, b]"]
    recipe = load_recipe(write(tmp_path, SMALLEST), overrides)
    assert recipe.train.learning_rate == 1e-5
    assert recipe.data.sources[0].limit == 3
    assert recipe.evaluate.prompts == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate", "not of the form a.b=c"),
        ("data.sources.7.limit=3", "use an index from 0 to 0, or set the entire list"),
        ("train.lr=1", "--set train.lr"),
        ("seed=x", "--set seed"),
    ],
)
def test_the_error_for_a_wrong_override_names_it(
    tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in message(write(tmp_path, SMALLEST), [override])


def test_an_empty_list_has_no_index_to_override(tmp_path: Path) -> None:
    found = message(write(tmp_path, SMALLEST), ["train.teachers=[]", "train.teachers.0=org/name"])
    assert "`train.teachers` is a list of 0 items" in found
    assert "set the entire list: --set train.teachers=[...]" in found


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    assert load_recipe(
        write(tmp_path, SMALLEST), ["evaluate.prompts=['1e5']"]
    ).evaluate.prompts == ["1e5"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.early_stop=2", "early_stop needs evaluate_every"),
        (
            "objective.terms=[{divergence: cross_entropy, temperature: 2}]",
            "cross_entropy has no temperature",
        ),
        ("objective.terms=[{divergence: jsd, alpha: 0.5}]", "jsd has no alpha: it accepts beta"),
        (
            "objective.terms=[{divergence: normalized_jsd, beta: 1.5}]",
            "must be between 0 and 0.999999",
        ),
        ("objective.terms=[{divergence: jsd, beta: 0}]", "jsd with beta 0 is 0 for every student"),
        ("objective.terms=[{divergence: alpha_beta, alpha: 0, beta: 0}]", "is not defined when"),
        ("objective.terms=[{weight: 0}, {divergence: jsd, weight: 0}]", "nothing would be learned"),
        ("objective.terms=[{schedule: {start: 0, end: 0}}]", "nothing would be learned"),
        ("data.train_tokens=100", "less than one window"),
        (
            "evaluate.cut_baseline=true",
            "set student.start to pruned and student.refit to true, or remove it",
        ),
        (
            "signals={encoding: {kind: stratified, k: 200, draws: 100}}",
            "k + draws must be at most 254, and is 300",
        ),
        (
            "signals={encoding: {kind: top_k}, server: {base_url: 'http://h/?key=k', model: m}}",
            "must not contain a user, a password, or a query",
        ),
        (
            "synthesize={teacher: {api: {base_url: http://h, model: m}}, prompts: {path: p}, "
            "filters: {min_characters: 9, max_characters: 8}}",
            "min_characters (9) is greater than max_characters (8)",
        ),
    ],
)
def test_values_that_make_no_sense_together_are_rejected(
    tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in message(write(tmp_path, SMALLEST), [override])


@pytest.mark.run
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda children: st.lists(children) | st.dictionaries(st.text(), children),
        max_leaves=8,
    )
)
def test_no_value_raises_any_error_but_a_recipe_error(value: object) -> None:
    raw = yaml.safe_load(SMALLEST)
    for key in ("name", "teacher", "data", "student", "objective", "train", "extra"):
        with contextlib.suppress(RecipeError):
            parse_recipe({**raw, key: value})


def test_an_old_name_of_a_key_works_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = "student: {start: pruned, layers: 2, reconstruct: false}"
    recipe = load_recipe(write(tmp_path, SMALLEST.replace("student:\n  start: random\n", student)))
    assert not recipe.student.refit
    assert "`reconstruct` is now called `refit`" in capsys.readouterr().err


def test_a_key_under_both_of_its_names_is_rejected(tmp_path: Path) -> None:
    student = "student: {start: pruned, layers: 2, reconstruct: false, refit: false}"
    with pytest.raises(RecipeError, match="`reconstruct` is the old name of `refit`"):
        load_recipe(write(tmp_path, SMALLEST.replace("student:\n  start: random\n", student)))
