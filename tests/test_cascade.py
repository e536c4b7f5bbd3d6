"""Families: each member is pruned from the one before, and no work is repeated.

One report compares all members.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from stillhouse import account
from stillhouse.commands import evaluate_model
from stillhouse.commands import run as run_cascade
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import ModelError, RecipeError, StillhouseError
from stillhouse.evaluation.family_evaluation import FAMILY_FILE
from stillhouse.family.family import FAMILY
from stillhouse.family.members import first_member, planned_members
from stillhouse.kinds import kind_of
from stillhouse.language_model import synthesis_stage as synthesis
from stillhouse.language_model.job import find_models
from stillhouse.language_model.recipe import RUN_FOLDER_NAMES
from stillhouse.pipeline.kind import RunResult as FamilyResult
from stillhouse.report.page import FAMILY_REPORT, REPORT, REPORT_DATA, redraw_report
from stillhouse.training.train import MODEL
from tests import tiny

pytestmark = pytest.mark.run

HOPS = [{"name": "wide", "ffn_size": 48}, {"name": "narrow", "ffn_size": 32, "layers": 2}]
STUDENT = {"start": "pruned", "calibration_tokens": 512}


def recipe(folder: Path, hops: list[dict[str, Any]] = HOPS, **changes: Any) -> dict[str, Any]:
    raw = tiny.recipe(folder, cascade={"hops": hops, **changes})
    return {**raw, "student": STUDENT, "signals": {"encoding": {"kind": "top_k", "k": 64}}}


def run_family(raw: dict[str, Any]) -> FamilyResult:
    result = run_cascade(raw)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FamilyResult]:
    folder = tmp_path_factory.mktemp("family")
    return folder, run_family(recipe(folder))


def test_every_member_loads_and_is_smaller_than_the_one_before(
    family: tuple[Path, FamilyResult],
) -> None:
    _, result = family
    assert list(result.members) == ["wide", "narrow"]
    wide, narrow = (
        AutoModelForCausalLM.from_pretrained(member.model) for member in result.members.values()
    )
    assert (wide.config.intermediate_size, wide.config.num_hidden_layers) == (48, 3)
    assert (narrow.config.intermediate_size, narrow.config.num_hidden_layers) == (32, 2)


def test_the_teacher_scores_the_text_once_for_the_family(family: tuple[Path, FamilyResult]) -> None:
    _, result = family
    stages = {name: {s.name: s for s in r.stages} for name, r in result.members.items()}
    for name in ("data", "signals"):
        assert not stages["wide"][name].reused
        assert stages["narrow"][name].reused
    assert list(stages["narrow"]["student"].summary["pruning"]["ffn_size"]) == [48, 32]


def test_adding_a_hop_repeats_no_work(family: tuple[Path, FamilyResult]) -> None:
    folder, _ = family
    more = run_family(recipe(folder, [*HOPS, {"name": "least", "ffn_size": 16}]))
    assert all(s.reused for m in ("wide", "narrow") for s in more.members[m].stages)
    stages = {stage.name: stage for stage in more.members["least"].stages}
    assert list(stages["student"].summary["pruning"]["ffn_size"]) == [32, 16]


def test_evaluating_a_family_needs_the_name_of_a_model(family: tuple[Path, FamilyResult]) -> None:
    folder, result = family
    file = folder / "family.yaml"
    file.write_text(yaml.safe_dump(recipe(folder)))
    with pytest.raises(ModelError, match="several models") as caught:
        evaluate_model(file)
    assert str(result.folder / "narrow" / "checkpoint") in str(caught.value)


def test_a_preview_does_not_change_the_recipe_of_the_family(
    family: tuple[Path, FamilyResult],
) -> None:
    folder, result = family
    before = (result.folder / "recipe.yaml").read_text()
    FAMILY.preview(parse_recipe(recipe(folder)), folder, 1)
    assert (result.folder / "recipe.yaml").read_text() == before
    assert "cascade:\n  hops:" in before


@pytest.mark.parametrize("teacher", ["previous", "both"])
def test_a_member_learns_from_the_one_before_or_from_both(tmp_path: Path, teacher: str) -> None:
    raw = recipe(tmp_path, teacher=teacher)
    with pytest.raises(RecipeError, match="signals come from the original teacher only"):
        run_cascade(raw)
    del raw["signals"]
    result = run_family(raw)
    sizes, asked = {}, {}
    for name, member in result.members.items():
        found = {stage.name: stage for stage in member.stages}
        size = sizes[name] = found["student"].summary["parameters"]["active"]
        trained = found["train"].cost
        own = account.training_flops(size, trained.tokens)
        asked[name] = (trained.flops - own) / account.forward_flops(1, trained.tokens)
    original = account.count_parameters(tiny.llama()).active
    assert asked["wide"] == pytest.approx(original)
    expected = sizes["wide"] + (original if teacher == "both" else 0)
    assert asked["narrow"] == pytest.approx(expected)
    # All members are measured against the original teacher.
    measured = result.members["narrow"].evaluation.result("teacher")
    assert measured is not None
    assert measured.parameters == account.count_parameters(tiny.llama()).total


def test_training_from_random_weights_is_measured_and_reported(tmp_path: Path) -> None:
    result = run_family(recipe(tmp_path, from_scratch={"tokens": 12_000, "learning_rate": 3e-3}))
    found = json.loads((result.folder / "family.json").read_text())
    scratch = found["scratch"]
    tokens, kls = zip(*scratch["points"], strict=True)
    assert len(tokens) >= 12
    assert kls[-1] < kls[0]
    assert tokens[-1] == pytest.approx(12_000, rel=0.15)
    assert scratch["flops"] > 0
    page = result.report.read_text()
    assert "with the shape of wide, trained from random weights with the same teacher" in page
    assert "kWh, at an assumed" in page
    again = run_family(recipe(tmp_path, from_scratch={"tokens": 12_000, "learning_rate": 3e-3}))
    assert json.loads((again.folder / "family.json").read_text())["scratch"] == scratch


def test_only_the_last_member_is_quantized_and_exported_as_gguf(tmp_path: Path) -> None:
    words = tiny.merging_tokenizer()
    tiny.llama(vocab_size=len(words)).save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    raw = recipe(tmp_path, ship="last")
    raw["quantize"] = {"qat": {"tokens": 1000, "learning_rate": 1e-3}}
    raw["export"] = {"formats": ["gguf-q4_0"]}
    result = run_family(raw)
    wide, narrow = result.members.values()
    assert "quantize" not in [stage.name for stage in wide.stages]
    assert (wide.model / "model.safetensors").is_file()
    kl = {model.role: model.fidelity.kl for model in narrow.evaluation.models}
    assert kl["quantized_trained"] < kl["quantized"]
    file = narrow.model / "tiny-narrow-q4_0.gguf"
    shipped = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    assert shipped.config.num_hidden_layers == 2
    assert "narrow, QAT" in (result.folder / "family.html").read_text()


def test_a_moved_run_folder_only_gets_new_reports(tmp_path: Path) -> None:
    hops: list[dict[str, Any]] = [
        {"name": "wide", "ffn_size": 48},
        {"name": "found", "target": {"params": "85%"}},
    ]
    raw = recipe(tmp_path, hops, from_scratch={"tokens": 3000}, teacher="both")
    raw["student"] = {**STUDENT, "search": SEARCH}
    del raw["signals"]
    run_family(raw)
    before = {path.name for path in tmp_path.glob("run/stages/*")}
    (tmp_path / "run").rename(tmp_path / "moved")
    raw["folder"] = str(tmp_path / "moved")
    run_family(raw)
    new = {path.name for path in tmp_path.glob("moved/stages/*")} - before
    # A report shows the recipe, and with it the folder.
    assert {name.partition("-")[0] for name in new} == {"report"}


def test_one_shot_members_are_all_pruned_from_the_teacher(tmp_path: Path) -> None:
    result = run_family(recipe(tmp_path, start="original"))
    stages = {stage.name: stage for stage in result.members["narrow"].stages}
    assert list(stages["student"].summary["pruning"]["ffn_size"]) == [64, 32]


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for name, value in attrs if name == "href" and tag == "a"]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_familys_page_has_every_member_and_links_to_its_report(
    family: tuple[Path, FamilyResult], charts: None
) -> None:
    folder, _ = family
    result = run_family(recipe(folder))
    assert "<path" in redraw_report(result.folder, folder / "page.html").read_text()
    page = Page(result.report.read_text())
    assert {"Teacher", "wide", "narrow"} <= set(page.words)
    links = [link for link in page.links if not link.startswith("#")]
    assert links == ["wide/report.html", "narrow/report.html"]
    assert all((result.folder / link).exists() for link in links)
    data = json.loads((result.folder / FAMILY_FILE).read_text())
    assert [member["name"] for member in data["members"]] == ["wide", "narrow"]
    assert all(member["seconds"] > 0 and member["flops"] > 0 for member in data["members"])
    assert set(data["generations"][0]["answers"]) == {"teacher", "wide", "narrow"}


@pytest.mark.parametrize(
    ("hops", "message"),
    [
        ([HOPS[0], {"name": "wide", "ffn_size": 32}], "same name"),
        ([HOPS[0], {"name": "Wide", "ffn_size": 32}], "same name"),
        ([{"name": "stages", "ffn_size": 32}], "cannot be called stages"),
        ([{"name": "Family.html", "ffn_size": 32}], "cannot be called Family.html"),
        ([{"name": "gguf-q8_0", "ffn_size": 32}], "cannot be called gguf-q8_0"),
        ([{"name": "wide", "ffn_size": 65}], "ffn_size: 65 is not possible: the teacher has 64"),
        ([HOPS[0], {"name": "more", "ffn_size": 64}], "ffn_size: 64 is not possible: wide has 48"),
        ([{"name": "none"}], "needs a size"),
    ],
)
def test_invalid_hops_are_rejected(
    tmp_path: Path, hops: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(StillhouseError, match=message) as caught:
        run_cascade(recipe(tmp_path, hops))
    assert caught.value.where
    assert not list(tmp_path.glob("run/stages/*"))


def test_training_from_scratch_needs_at_least_one_window(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"from_scratch\.tokens \(16\) is less than one window"):
        run_cascade(recipe(tmp_path, from_scratch={"tokens": 16}))


def test_the_recipe_determines_whether_a_family_is_trained(tmp_path: Path) -> None:
    assert kind_of(parse_recipe(tiny.recipe(tmp_path))).name == "language model"
    assert kind_of(parse_recipe(recipe(tmp_path))).name == "family"


SEARCH = {
    "axes": ["layers", "ffn_size"],
    "multiple_of": 8,
    "tolerance": 0.15,
    "candidates": 2,
    "calibration_tokens": 256,
    "heldout_tokens": 128,
    "steps": 1,
}


def test_hops_with_targets_are_searched_for_a_smaller_shape(tmp_path: Path) -> None:
    hops: list[dict[str, Any]] = [
        {"name": "first", "target": {"params": "85%"}},
        {"name": "second", "layers": 2},
    ]
    raw = recipe(tmp_path, hops)
    raw["student"] = {**STUDENT, "search": SEARCH}
    result = run_family(raw)
    stages = {stage.name: stage for stage in result.members["first"].stages}
    sizes = stages["search"].summary["sizes"]
    changed = stages["student"].summary["pruning"]["changed"]
    assert {key: after for key, (_, after) in changed.items()} == sizes
    assert "search" not in {stage.name for stage in result.members["second"].stages}
    total = stages["student"].summary["parameters"]["total"]
    whole = stages["student"].summary["teacher_parameters"]["total"]
    assert 0.7 * whole <= total <= 0.85 * whole
    again = run_family(raw)
    assert all(stage.reused for stage in again.members["first"].stages)


def planned(raw: dict[str, Any]) -> list[Any]:
    loaded = tiny.parsed(raw)
    return [c for _, c in planned_members(loaded, find_models(first_member(loaded), Path()))]


def test_a_hop_after_a_searched_one_is_rejected_only_if_no_shape_allows_it(
    tmp_path: Path,
) -> None:
    hops: list[dict[str, Any]] = [
        {"name": "first", "target": {"params": "85%"}},
        {"name": "second", "ffn_size": 60},
    ]
    raw = recipe(tmp_path, hops)
    raw["student"] = {**STUDENT, "search": SEARCH}
    first, second = planned(raw)
    # The guess for the first hop is narrower, but the search may find a wider one of fewer layers.
    assert first.intermediate_size < 60
    assert second.intermediate_size == 60
    hops[1]["ffn_size"] = 65
    with pytest.raises(RecipeError, match="ffn_size: 65 is not possible"):
        planned(raw)


def test_a_family_with_a_start_model_is_planned_from_that_model(tmp_path: Path) -> None:
    raw = recipe(tmp_path, [{"name": "wide", "ffn_size": 72}])
    tiny.save_model(tmp_path / "start", intermediate_size=80, num_hidden_layers=2)
    raw["student"] = {**STUDENT, "model": str(tmp_path / "start")}
    (wide,) = planned(raw)
    assert (wide.intermediate_size, wide.num_hidden_layers) == (72, 2)
    raw["cascade"]["hops"][0]["ffn_size"] = 81
    with pytest.raises(RecipeError, match="the model that is pruned has 80"):
        planned(raw)


def test_all_names_in_a_run_folder_are_reserved(family: tuple[Path, FamilyResult]) -> None:
    folder, _ = family
    names = {
        FAMILY_FILE,
        "signals",
        FAMILY_REPORT,
        REPORT,
        REPORT_DATA,
        MODEL,
        synthesis.NAME,
    }
    names |= {path.name for path in (folder / "run").iterdir() if not path.name.startswith(".")}
    assert names - set(RUN_FOLDER_NAMES) <= {"wide", "narrow", "least"}


@pytest.mark.parametrize(
    ("hops", "message"),
    [
        ([{"name": "small", "target": {"params": "2%"}}], "smaller than the axes"),
        ([{"name": "large", "target": {"params": "120%"}}], "not smaller than the model"),
        ([{"name": "both", "target": {"params": "60%"}, "layers": 2}], "a target or sizes"),
    ],
)
def test_hops_with_impossible_targets_are_rejected(
    tmp_path: Path, hops: list[dict[str, Any]], message: str
) -> None:
    raw = recipe(tmp_path, hops)
    raw["student"] = {**STUDENT, "search": SEARCH}
    with pytest.raises(StillhouseError, match=message):
        run_cascade(raw)
    assert not list(tmp_path.glob("run/stages/*"))


def test_shared_sizes_together_with_a_target_are_rejected(tmp_path: Path) -> None:
    hops: list[dict[str, Any]] = [
        {"name": "wide", "ffn_size": 48},
        {"name": "found", "target": {"params": "85%"}},
    ]
    raw = recipe(tmp_path, hops)
    raw["student"] = {**STUDENT, "layers": 2}
    with pytest.raises(RecipeError, match=r"student.layers would apply .*\(found\)"):
        run_cascade(raw)
