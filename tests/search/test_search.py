"""The search on a tiny model: its measurements, its journal, and its choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.account import count_parameters, forward_flops, training_flops
from stillhouse.checksums import without_hash
from stillhouse.errors import DataError
from stillhouse.pruning.axes import axes_of
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.reference import mean_kl, reference_on
from stillhouse.pruning.shapes import sizes_to_prune
from stillhouse.pruning.sizes import sizes_of
from stillhouse.search import search_shape as searching
from stillhouse.search import trial_log as search_journal
from stillhouse.search.probes import Curve, curves, expected, probed
from stillhouse.search.search_shape import CANDIDATES, WORK, Found, Setting, search_shape
from stillhouse.search.search_text import batches_of, split_text
from stillhouse.search.short_training import distill_shortly
from stillhouse.search.trial_log import Journal
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.load_model import load_config, load_model
from stillhouse.training.train_config import TrainRecipe
from tests.clocks import Clock
from tests.teachers.toys import VOCABULARY, ToyWindows, save_model, tiny_model

pytestmark = pytest.mark.run

WINDOWS = ToyWindows(count=48)


def setting(folder: Path, out: str = "out", target: str = "65%", **search: Any) -> Setting:
    """A search in which four of many shapes are pruned, and two rounds of training choose one."""
    if not (folder / "teacher").exists():
        save_model(folder / "teacher")
    choices = {
        "multiple_of": 8,
        "tolerance": 0.1,
        "candidates": 4,
        "calibration_tokens": 256,
        "heldout_tokens": 128,
        "steps": 2,
        **search,
    }
    section = PrunedStudent.model_validate(
        {"start": "pruned", "target": {"params": target}, "search": choices}
    )
    return Setting(
        section=section,
        train=TrainRecipe(batch_size=2, learning_rate=1e-3),
        start=folder / "teacher",
        teacher=folder / "teacher",
        windows=WINDOWS,
        vocabulary=VOCABULARY,
        seed=0,
        dtype=torch.float32,
        served=torch.bfloat16,
        device=torch.device("cpu"),
        out=folder / out,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Found]:
    """A search with a clock on which every reading is a second later than the previous one."""
    chosen = setting(tmp_path_factory.mktemp("search"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_journal, "time", Clock(tick=1.0))
        return chosen, search_shape(chosen)


def test_four_shapes_are_trained_two_are_trained_again_and_the_best_is_chosen(
    found: tuple[Setting, Found],
) -> None:
    _, result = found
    pruned = [one for one in result.candidates if one.one_shot_kl is not None]
    assert len(result.candidates) > len(pruned) == 4
    finals = [one for one in pruned if len(one.trained_kl) == 2]
    assert sorted(len(one.trained_kl) for one in pruned) == [1, 1, 2, 2]
    best = min(finals, key=lambda one: one.trained_kl[-1])
    before = sizes_of(load_model(found[0].start, dtype=torch.float32).config)
    assert {**vars(before), **result.sizes} == vars(best.sizes)


def test_training_helps_every_candidate(found: tuple[Setting, Found]) -> None:
    for one in found[1].candidates:
        for earlier, later in zip([one.one_shot_kl, *one.trained_kl], one.trained_kl, strict=False):
            assert earlier is not None
            assert later < earlier


def test_one_shot_kl_is_that_of_pruning_the_shape_directly(found: tuple[Setting, Found]) -> None:
    """The state that candidates share does not change any of them."""
    chosen, result = found
    text = split_text(WINDOWS, 128, 2 * 6, 0)
    teacher = load_model(chosen.teacher, dtype=torch.float32)
    heldout = batches_of(text.heldout, 8, "cpu")
    known = reference_on(teacher, heldout, torch.float32, VOCABULARY)
    before = sizes_of(teacher.config)
    compared = 0
    for one in result.candidates:
        if one.one_shot_kl is not None and one.sizes.layers == before.layers:
            model = load_model(chosen.start, dtype=torch.float32)
            cut: Any = sizes_to_prune(before, one.sizes)
            prune_model(model, text.calibration, calibration_tokens=256, **cut)
            assert mean_kl(known, model, torch.float32) == pytest.approx(one.one_shot_kl, rel=1e-4)
            compared += 1
    assert compared


def test_experts_are_probed_pruned_and_measured_like_any_other_axis(tmp_path: Path) -> None:
    save_model(tmp_path / "teacher", tiny_model("qwen3_moe", num_experts=8))
    axes = ["experts", "layers"]
    chosen = setting(tmp_path, axes=axes, target="75%", tolerance=0.2, candidates=2, trained=1)
    result = search_shape(chosen)
    measured = Journal(chosen.out / WORK / searching.JOURNAL).found
    assert any(name.startswith("probe experts") for name in measured)
    tried = [one for one in result.candidates if one.one_shot_kl is not None]
    fewer = next(one for one in tried if one.sizes.experts != 8)
    model = load_model(chosen.start, dtype=torch.float32)
    prune_model(model, WINDOWS, calibration_tokens=256, experts=fewer.sizes.experts)
    assert count_parameters(model).total == fewer.parameters
    best = min(tried, key=lambda one: one.one_shot_kl or 0)
    assert {**vars(sizes_of(load_config(chosen.start))), **result.sizes} == vars(best.sizes)


def test_all_candidates_are_written_to_a_file(found: tuple[Setting, Found]) -> None:
    chosen, result = found
    written = json.loads((chosen.out / CANDIDATES).read_text())
    assert written["chosen"] == result.sizes
    assert len(written["candidates"]) == len(result.candidates)
    assert written["target"]["key"] == "params"


def test_the_parts_of_the_text_share_no_window() -> None:
    text = split_text(WINDOWS, 128, 10, 0)
    parts = [set(part.numbers) for part in (text.calibration, text.training, text.heldout)]
    assert [len(part) for part in parts] == [34, 10, 4]
    assert set.union(*parts) == set(range(48))
    with pytest.raises(DataError, match="needs at least 4 training windows, not 3"):
        split_text(ToyWindows(count=3), 128, 10, 0)


def test_a_killed_search_resumes_and_repeats_no_work(
    found: tuple[Setting, Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = replace(found[0], out=found[0].out.with_name("killed"))
    did: list[str] = []
    kill_at = 0
    real_prune, real_train = prune_model, distill_shortly

    def counted_prune(*args: Any, **options: Any) -> Any:
        did.append("prune")
        if len(did) == kill_at:
            raise KeyboardInterrupt
        return real_prune(*args, **options)

    def counted_train(*args: Any, **options: Any) -> None:
        did.append("train")
        if len(did) == kill_at:
            raise KeyboardInterrupt
        real_train(*args, **options)

    monkeypatch.setattr(searching, "prune_model", counted_prune)
    monkeypatch.setattr(searching, "distill_shortly", counted_train)
    total = 0
    for kill_at in (2, 4, 5, 3):  # noqa: B007 (the counters above read it)
        did.clear()
        with pytest.raises(KeyboardInterrupt):
            search_shape(chosen)
        total += len(did) - 1
    did.clear()
    kill_at = 0
    again = search_shape(chosen)
    undisturbed = len(Journal(found[0].out / WORK / searching.JOURNAL).found)
    assert again == found[1]
    # The journal also holds the start model's own KL and the order of the layers.
    assert total + len(did) == undisturbed - 2


def test_flops_and_seconds_include_those_of_earlier_runs(
    found: tuple[Setting, Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, result = found
    teacher = count_parameters(load_model(chosen.teacher, dtype=torch.float32)).active
    # The short distillations, and a forward pass over the calibration rows for each candidate.
    least = training_flops(teacher // 2, result.tokens) + forward_flops(teacher // 2, 4 * 256)
    assert result.flops > 2 * least
    again = search_shape(chosen)
    # Nothing is measured again; the journal contains what the first run took.
    assert again.flops == result.flops
    assert again.seconds > result.seconds / 2
    timed = replace(chosen, out=chosen.out.with_name("counted"))
    monkeypatch.setattr(searching, "prune_model", stop)
    with pytest.raises(KeyboardInterrupt):
        search_shape(timed)
    spent = json.loads(without_hash((timed.out / WORK / searching.JOURNAL).read_bytes()))
    assert 0 < sum(spent["flops"].values()) < result.flops
    assert spent["seconds"] > 0


def stop(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_a_damaged_journal_is_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal"
    assert Journal(path).once("kl", lambda: 0.25) == 0.25
    assert Journal(path).once("kl", lambda: 1.0) == 0.25
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.75"))
    assert Journal(path).once("kl", lambda: 0.5) == 0.5
    assert "is damaged" in capsys.readouterr().err


def test_a_search_without_training_chooses_by_one_shot_kl(tmp_path: Path) -> None:
    result = search_shape(setting(tmp_path, trained=0, candidates=2))
    pruned = [one for one in result.candidates if one.one_shot_kl is not None]
    assert not any(one.trained_kl for one in pruned)
    best = min(pruned, key=lambda one: one.one_shot_kl or 0)
    assert all(getattr(best.sizes, key) == value for key, value in result.sizes.items())
    assert result.tokens == 0


def test_a_single_shape_is_not_measured(tmp_path: Path) -> None:
    result = search_shape(setting(tmp_path, axes=["ffn_size"], tolerance=0.2, target="80%"))
    assert list(result.sizes) == ["ffn_size"]
    assert [one.one_shot_kl for one in result.candidates] == [None]


def test_shapes_are_ranked_by_the_sum_of_their_axes_costs() -> None:
    before = sizes_of(tiny_model().config)
    one, two = replace(before, ffn_size=32), replace(before, ffn_size=48, heads=2, layers=2)
    probes = probed(before, [one, two], lambda shape: True)
    assert [s.ffn_size for s in probes["ffn_size"]] == [32, 48]
    known = curves(before, probes, lambda s: 64 - s.ffn_size + 4 - s.heads)
    assert known["ffn_size"].points == ((0.5, 32.0), (0.75, 16.0), (1.0, 0.0))
    assert known["ffn_size"].at(0.875) == pytest.approx(8.0)
    assert known["ffn_size"].at(0.25) == pytest.approx(48.0)
    assert expected(before, two, known, {2: 0.5}) == pytest.approx(16 + 2 + 0.5)
    assert expected(before, two, known, {}) == float("inf")
    assert Curve(((1.0, 0.0),)).at(0.5) == 0.0


def test_an_axis_that_could_not_be_probed_is_not_favored() -> None:
    before = sizes_of(tiny_model().config)
    narrow = replace(before, hidden_size=16)
    known = {
        "ffn_size": Curve(((0.5, 2.0), (1.0, 0.0))),
        "attention": Curve(((0.5, 3.0), (1.0, 0.0))),
        "hidden_size": Curve(((1.0, 0.0),)),
    }
    assert expected(before, narrow, known, {}) == pytest.approx(3.0)
    assert expected(before, before, known, {}) == 0.0


@pytest.mark.parametrize(("kind", "kept"), [("llama", 2), ("gemma2", 4)])
def test_streams_are_shared_among_candidates_only_if_all_of_them_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kept: int
) -> None:
    config = tiny_model(kind).config
    journal = Journal(tmp_path / "journal.json")
    work = searching._Work(setting(tmp_path), journal, sizes_of(config), axes_of(config))
    bytes_a_token = 4 * kept * config.num_hidden_layers * config.hidden_size
    monkeypatch.setattr(searching, "KEPT_BYTES", 100 * bytes_a_token)
    assert work._fits(100)
    assert not work._fits(101)


def test_widths_that_the_heads_do_not_divide_are_probed_at_the_next_smaller_one(
    tmp_path: Path,
) -> None:
    """SmolLM2, for example, has nine heads, which divide 576 and 504 but not 512."""
    sizes: dict[str, Any] = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
    save_model(tmp_path / "teacher", tiny_model(**sizes))
    before = sizes_of(load_model(tmp_path / "teacher", dtype=torch.float32).config)
    wanted = [replace(before, hidden_size=64, heads=8), replace(before, heads=7)]
    probes = probed(before, wanted, lambda shape: shape.hidden_size % shape.heads == 0)
    assert [shape.hidden_size for shape in probes["hidden_size"]] == [63]
    assert [shape.heads for shape in probes["attention"]] == [8]
    found = search_shape(setting(tmp_path, target="70%", trained=0))
    assert any(one.sizes.hidden_size < 72 for one in found.candidates)
    assert all(one.sizes.hidden_size % one.sizes.heads == 0 for one in found.candidates)
