"""Runs whose teacher scores the text once; training reads its signals from the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import stillhouse
from stillhouse import account, commands
from stillhouse.errors import RunError, SignalError
from stillhouse.language_model.signals_stage import STORE
from stillhouse.pipeline.kind import RunResult
from stillhouse.runfolder import Stage
from stillhouse.signals.encodings import Hidden
from stillhouse.signals.store import open_store
from stillhouse.signals.verify import verify
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.record_store import segments_of
from stillhouse.training.checkpoints import read_metrics
from tests import tiny

pytestmark = pytest.mark.run


def run(raw: dict[str, Any]) -> RunResult:
    result = stillhouse.run(raw)
    assert result is not None
    return result


def stages(result: RunResult) -> dict[str, Stage]:
    return {stage.name: stage for stage in result.stages}


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(stages(result)["train"].path / "model" / "model.safetensors")


def recipe(folder: Path, encoding: dict[str, Any], /, **sections: Any) -> dict[str, Any]:
    return tiny.recipe(folder, signals={"encoding": encoding}, **sections)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A run that stores 254 of 260 tokens, all but a thousandth of the teacher's probability."""
    folder = tmp_path_factory.mktemp("stored")
    return folder, run(recipe(folder, {"kind": "top_k", "k": 254}))


def test_a_nearly_complete_store_trains_like_a_live_teacher(
    stored: tuple[Path, RunResult],
) -> None:
    folder, result = stored
    live = run(tiny.recipe(folder, folder=str(folder / "live")))
    steps = [
        [row for row in read_metrics(stages(each)["train"].path / "metrics.jsonl") if "loss" in row]
        for each in (result, live)
    ]
    for ours, theirs in zip(*steps, strict=True):
        assert ours["forward_kl"] == pytest.approx(theirs["forward_kl"], rel=0.01)
    kl, expected = (r.evaluation.result("student").fidelity.kl for r in (result, live))
    assert kl == pytest.approx(expected, rel=0.01)


def test_training_from_a_store_counts_no_teacher_flops(stored: tuple[Path, RunResult]) -> None:
    _, result = stored
    trained, student = stages(result)["train"], stages(result)["student"]
    size = student.summary["parameters"]["active"]
    assert trained.cost.flops == account.training_flops(size, trained.cost.tokens)
    assert stages(result)["signals"].cost.tokens == trained.cost.tokens


def test_a_second_student_and_more_epochs_do_not_query_the_teacher(
    stored: tuple[Path, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = stored
    monkeypatch.setattr(LocalTeacher, "answer", _never)
    student = {"ffn_size": 48}
    encoding = {"kind": "top_k", "k": 254}
    second = run(recipe(folder, encoding, student=student, train={"epochs": 2}))
    assert stages(second)["signals"].reused
    assert not stages(second)["train"].reused


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the teacher was queried")


def test_a_damaged_shard_is_set_aside_and_recorded_again(tmp_path: Path) -> None:
    raw = recipe(tmp_path, {"kind": "top_k", "k": 8}, train={"max_steps": 6})
    whole = run({**raw, "folder": str(tmp_path / "whole")})
    run({**raw, "train": {**raw["train"], "max_steps": 1}})
    (shard,) = (tmp_path / "run").glob(f"stages/signals-*/{STORE}/shards/*.bin")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RunError, match="the shard is damaged") as caught:
        run(raw)
    assert (caught.value.where, "same command again" in str(caught.value.fix)) == (str(shard), True)
    again = run(raw)
    assert not stages(again)["signals"].reused
    assert not [file for file in shard.parent.iterdir() if file.suffix == ".damaged"]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name])


def test_an_interrupted_recording_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = recipe(tmp_path, {"kind": "threshold", "bytes": 60}, data={"train_tokens": 3000})
    monkeypatch.setattr(LocalTeacher, "tokens_together", 320)
    asked: list[int] = []
    answer = LocalTeacher.answer

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        if len(asked) == 25:
            raise KeyboardInterrupt
        asked.append(1)
        return answer(*args, **kwargs)

    monkeypatch.setattr(LocalTeacher, "answer", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(raw)
    before = list(asked)
    asked.extend([0] * 100)  # never 25 again
    result = run(raw)
    store = stages(result)["signals"].path / STORE
    assert verify(store) == []
    whole = run({**raw, "folder": str(tmp_path / "whole")})
    assert all(torch.equal(weights(result)[name], weights(whole)[name]) for name in weights(whole))
    windows = 96 // 10 + 1
    assert len(before) == 25
    assert len(asked) - 125 < 17 + 2 * windows + 17


EVERYTHING = {
    "terms": [
        {"divergence": "reverse_kl"},
        {"divergence": "adaptive_kl", "temperature": 2.0},
        {"kind": "hidden_states", "pairs": [[0, 0], [1, 1]], "embeddings": True},
    ]
}
"""Needs the last hidden states, those of the first block, and the embeddings."""


def test_stored_hidden_states_serve_every_divergence_and_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = run(tiny.recipe(tmp_path, objective=EVERYTHING, folder=str(tmp_path / "live")))
    raw = recipe(tmp_path, {"kind": "hidden"}, objective=EVERYTHING)
    record_signals(raw)
    monkeypatch.setattr(LocalTeacher, "answer", _never)
    stored = run(raw)
    steps = [losses(result) for result in (live, stored)]
    for theirs, ours in zip(*steps, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)
    kl, expected = (r.evaluation.result("student").fidelity.kl for r in (stored, live))
    assert kl == pytest.approx(expected, rel=0.02)
    store = open_store(stages(stored)["signals"].path / STORE)
    assert store.settings.encoding == Hidden((0, 1, 3), 32)


def losses(result: RunResult) -> list[float]:
    rows = read_metrics(stages(result)["train"].path / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def record_signals(raw: dict[str, Any]) -> None:
    file = Path(raw["folder"]).parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    commands.record_signals(file)


def test_a_frozen_head_learns_from_one_vector_per_token(tmp_path: Path) -> None:
    frozen = {"freeze_head": True}
    live = run(tiny.recipe(tmp_path, train=frozen, folder=str(tmp_path / "live")))
    raw = recipe(tmp_path, {"kind": "frozen_head"}, train=frozen)
    record_signals(raw)
    stored = run(raw)
    assert stages(stored)["signals"].reused
    for theirs, ours in zip(losses(live), losses(stored), strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)
    before = load_file(stages(stored)["student"].path / "model" / "model.safetensors")
    after = weights(stored)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_a_store_for_one_head_is_rejected_for_another(tmp_path: Path) -> None:
    frozen = {"freeze_head": True}
    first = run(recipe(tmp_path, {"kind": "frozen_head"}, train=frozen))
    read = {"store": str(stages(first)["signals"].path / STORE)}
    narrower = {"hidden_size": 16}
    with pytest.raises(SignalError, match="head"):
        run(tiny.recipe(tmp_path, signals=read, train=frozen, student=narrower))
    with pytest.raises(SignalError, match="the student's head is not trained"):
        run(tiny.recipe(tmp_path, signals=read))


def test_a_store_of_fewer_layers_than_the_terms_need_is_rejected(tmp_path: Path) -> None:
    first = run(recipe(tmp_path, {"kind": "hidden"}))
    read = {"store": str(stages(first)["signals"].path / STORE)}
    with pytest.raises(SignalError, match=r"layers \[3\], but the objective also needs \[0, 1\]"):
        run(tiny.recipe(tmp_path, signals=read, objective=EVERYTHING))


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ({"kind": "top_k", "k": 254}, "heldout_kl"),
        ({"kind": "hidden"}, "heldout_kl"),
        ({"kind": "threshold", "bytes": 60}, "heldout_teacher_cross_entropy"),
    ],
)
def test_measurements_during_training_read_the_teacher_from_the_store(
    tmp_path: Path, encoding: dict[str, Any], name: str
) -> None:
    train = {"evaluate_every": 4, "max_steps": 12, "early_stop": 3}
    result = run(recipe(tmp_path, encoding, train=train))
    rows = read_metrics(stages(result)["train"].path / "metrics.jsonl")
    measured = [row[name] for row in rows if name in row]
    assert len(measured) == 3
    student = result.evaluation.result("student")
    assert student is not None
    if name == "heldout_kl":
        assert measured[-1] == pytest.approx(student.fidelity.kl, rel=0.03)
    else:
        assert measured[-1] > student.fidelity.kl  # by the teacher's entropy
    assert measured[0] > measured[-1]


def test_a_threshold_is_tuned_to_the_requested_size(tmp_path: Path) -> None:
    result = run(recipe(tmp_path, {"kind": "threshold", "bytes": 60}))
    summary = stages(result)["signals"].summary
    assert summary["squared_bias"] == 0
    # Segments of 11 tokens have another 28 bytes each for keys, offsets, and checksums.
    assert 60 * 0.9 < summary["bytes"] < 60 * 1.1 + 12


@pytest.mark.parametrize(
    ("terms", "encoding", "message"),
    [
        ([{"divergence": "jsd"}], {"kind": "threshold"}, "jsd cannot be computed from signals"),
        ([{"divergence": "adaptive_kl"}], {"kind": "top_k"}, "adaptive_kl cannot be computed"),
        ([{"kind": "hidden_states"}], {"kind": "top_k"}, "intermediate layers"),
        ([{}, {"divergence": "jsd", "temperature": 2}], {"kind": "top_k"}, "temperatures 1, 2"),
    ],
)
def test_terms_that_a_store_cannot_serve_are_rejected_before_any_stage(
    tmp_path: Path, terms: list[dict[str, Any]], encoding: dict[str, Any], message: str
) -> None:
    with pytest.raises(SignalError, match=message) as caught:
        run(recipe(tmp_path, encoding, objective={"terms": terms}))
    assert caught.value.fix
    assert not list((tmp_path / "run" / "stages").iterdir())


# --- a store that another run recorded ---------------------------------------------------------

ENCODING = {"kind": "top_k", "k": 16}
WHOLE = {"packing": "none"}
"""Documents are not split at the ends of windows, so that other windows have the same segments."""


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of about half of the training text, and the folder of the models and texts."""
    folder = tmp_path_factory.mktemp("part")
    data = {**WHOLE, "train_tokens": 850}
    result = run(recipe(folder, ENCODING, data=data, folder=str(folder / "a")))
    return folder, stages(result)["signals"].path / STORE


def test_a_run_reads_the_store_of_another(part: tuple[Path, Path], monkeypatch: Any) -> None:
    folder, store = part
    monkeypatch.setattr(LocalTeacher, "answer", _never)
    changes = {"data": {**WHOLE, "train_tokens": 850}, "train": {"batch_size": 2}}
    signals = {"store": str(store)}
    result = run(tiny.recipe(folder, folder=str(folder / "b"), signals=signals, **changes))
    assert "signals" not in stages(result)
    assert stages(result)["train"].summary["steps"] > 0


def test_missing_text_is_rejected_with_its_amount(part: tuple[Path, Path]) -> None:
    folder, store = part
    with pytest.raises(SignalError, match=r"lacks [\d,]+ of [\d,]+ training tokens") as caught:
        run(
            tiny.recipe(folder, folder=str(folder / "c"), signals={"store": str(store)}, data=WHOLE)
        )
    assert "missing: live" in str(caught.value)


def test_missing_text_is_scored_live_with_the_same_result(
    part: tuple[Path, Path],
) -> None:
    folder, store = part
    section = {"store": str(store), "missing": "live"}
    mixed = run(tiny.recipe(folder, folder=str(folder / "d"), signals=section, data=WHOLE))
    whole = run(recipe(folder, ENCODING, folder=str(folder / "e"), data=WHOLE))
    for name, tensor in weights(whole).items():
        # The teacher's passes have other batches, whose sums differ in the last bits.
        torch.testing.assert_close(weights(mixed)[name], tensor, atol=1e-3, rtol=1e-3)
    alone, beside = (stages(r)["train"].cost for r in (whole, mixed))
    size = 2 * account.count_parameters(tiny.llama()).active
    asked = (beside.flops - alone.flops) / size
    assert 0.3 * alone.tokens < asked < 0.7 * alone.tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"terms": [{"temperature": 2}]}}, "a different temperature: it has 1"),
        ({"teacher": {"model": "other"}}, "a different teacher"),
        ({"objective": {"terms": [{"divergence": "adaptive_kl"}]}}, "adaptive_kl cannot"),
    ],
)
def test_a_store_of_another_run_is_rejected_with_both_values(
    part: tuple[Path, Path], changes: dict[str, Any], message: str
) -> None:
    folder, store = part
    tiny.save_model(folder / "other", seed=1)
    if "teacher" in changes:
        changes = {"teacher": {"model": str(folder / "other")}}
    section = {"store": str(store), "missing": "live"}
    with pytest.raises(SignalError, match=message) as caught:
        run(tiny.recipe(folder, folder=str(folder / "f"), signals=section, data=WHOLE, **changes))
    assert caught.value.fix


def test_a_store_of_another_template_is_rejected(part: tuple[Path, Path]) -> None:
    _, store = part
    expected = {"template": "0" * 64}
    with pytest.raises(SignalError, match=r"a different template: it has .* this run has 0000"):
        open_store(store, expected)


def test_a_batch_without_supervised_tokens_can_be_read(part: tuple[Path, Path]) -> None:
    _, store = part
    ids_RL = torch.arange(8)[None]
    batch = {"input_ids": ids_RL, "labels": torch.full_like(ids_RL, -100), "position_ids": ids_RL}
    signal = open_store(store).read(segments_of(batch))
    assert signal.ids_NK.shape[0] == signal.tail_N.shape[0] == 0
