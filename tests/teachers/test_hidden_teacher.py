"""Hidden states from vLLM (a stub here) fill the same store as a local teacher."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse.check import check_recipe
from stillhouse.commands import record_signals
from stillhouse.config.load_recipe import load_language_model_recipe, parse_recipe
from stillhouse.data.data import Data
from stillhouse.errors import ModelError, RecipeError, SignalError
from stillhouse.language_model.job import find_models
from stillhouse.language_model.signals_stage import StoredSignals, training_teacher
from stillhouse.objectives import Term
from stillhouse.objectives.objective_config import LogitsTerm, ObjectiveRecipe, ObjectiveTerm
from stillhouse.signals import DenseSignal
from stillhouse.signals.encodings import Hidden, TopK
from stillhouse.signals.manifest import Settings, read_settings
from stillhouse.signals.shards import open_shard, read_keys
from stillhouse.signals.signals_config import SignalServer
from stillhouse.signals.store import open_store
from stillhouse.students.student import Student
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.hidden_teacher import HiddenStateServer, HiddenStateTeacher
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.record_store import record, segments_of
from stillhouse.teachers.teacher import Teacher, TeacherNeeds
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe
from tests import tiny
from tests.teachers.hidden_engine import STUB, TERMS, PoolingServer, serving
from tests.teachers.test_served_teacher import TwoDocuments

pytestmark = pytest.mark.run

LAST, WIDTH = 3, 32
HIDDEN = Settings(Hidden((LAST,), WIDTH), len(tiny.tokenizer()), {"teacher": "tiny"})


@pytest.fixture
def server() -> Iterator[PoolingServer]:
    found = PoolingServer(tiny.llama())
    with serving(found):
        yield found


def teacher(server: PoolingServer, concurrency: int = 2, **more: Any) -> HiddenStateTeacher:
    section = SignalServer(base_url=server.base_url, model="tiny", concurrency=concurrency)
    source = HiddenStateServer(section, last=LAST, width=WIDTH, dtype=torch.float32)
    vocabulary = HIDDEN.vocabulary
    return HiddenStateTeacher(source, server.model.config, vocabulary=vocabulary, **more)


def batch_of(windows: TwoDocuments) -> dict[str, torch.Tensor]:
    return {name: torch.stack([windows[i][name] for i in range(3)]) for name in windows[0]}


# --- a server ------------------------------------------------------------------------------------


def test_a_server_fills_the_same_store_as_a_local_teacher(
    tmp_path: Path, server: PoolingServer
) -> None:
    windows = TwoDocuments()
    record(LocalTeacher(server.model), [windows], HIDDEN, tmp_path / "local")
    record(teacher(server), [windows], HIDDEN, tmp_path / "served")
    segments = segments_of(batch_of(windows))
    local, served = (
        open_store(tmp_path / name).read(segments).hidden_ND[LAST] for name in ("local", "served")
    )
    assert len(local) == 3 * (24 - 5)
    # Both are rounded to bfloat16, which has 8 bits of precision.
    torch.testing.assert_close(local, served, rtol=2**-7, atol=1e-4)
    assert sum(len(ids) for request in server.asked for ids in request["input"]) == 3 * (9 + 13)


def test_a_served_teacher_with_a_head_answers_like_a_local_one(server: PoolingServer) -> None:
    """It gives complete distributions during training, so that no store is needed."""
    local = LocalTeacher(server.model)
    batch = batch_of(TwoDocuments())
    expected = local.answer(batch, ActivationRequest(frozenset({LAST})))
    found = teacher(server, head=local.head).answer(batch, ActivationRequest(frozenset({LAST})))
    (dense,), (same,) = expected.signals, found.signals
    assert same.head.weight_VD is dense.head.weight_VD
    torch.testing.assert_close(same.hidden_ND, dense.hidden_ND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.layers[LAST], expected.layers[LAST], rtol=1e-5, atol=1e-5)


def test_training_with_served_hidden_states_matches_a_local_teacher(tmp_path: Path) -> None:
    """The term is reverse KL at temperature 2, which needs more than the top tokens."""
    words, folder = tiny.tokenizer(), tiny.save_model(tmp_path / "teacher")
    lines = tiny.text(60).splitlines()
    data = Data.build(lines, words, context=32, heldout_tokens=128, train_tokens=400)
    server = PoolingServer(tiny.llama())
    losses = []
    with serving(server):
        url = server.base_url
        served = Teacher.served_hidden(url, "tiny", folder, dtype="float32", concurrency=2)
        for taught_by in (served, Teacher.load(folder, dtype="float32")):
            student = Student(tiny.llama(seed=1), words)
            terms: list[ObjectiveTerm] = [LogitsTerm(divergence="reverse_kl", temperature=2.0)]
            section = TrainRecipe(batch_size=4, precision="float32", max_steps=3)
            result = train(student, taught_by, data.train, ObjectiveRecipe(terms=terms), section)
            losses.append([row["loss"] for row in result.metrics if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_top_tokens_from_hidden_states_match_a_local_teacher(
    tmp_path: Path, server: PoolingServer
) -> None:
    windows, settings = TwoDocuments(), Settings(TopK(5), HIDDEN.vocabulary, {"teacher": "tiny"})
    local = LocalTeacher(server.model)
    record(local, [windows], settings, tmp_path / "local")
    record(teacher(server, head=local.head), [windows], settings, tmp_path / "served")
    segments = segments_of(batch_of(windows))
    one, other = (open_store(tmp_path / name).read(segments) for name in ("local", "served"))
    assert torch.equal(one.ids_NK, other.ids_NK)
    torch.testing.assert_close(one.log_probs_NK, other.log_probs_NK, rtol=0, atol=2e-3)


def test_a_batch_without_supervised_tokens_sends_nothing(server: PoolingServer) -> None:
    batch = batch_of(TwoDocuments())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    head = LocalTeacher(server.model).head
    (signal,) = teacher(server, head=head).answer(batch).signals
    assert tuple(signal.hidden_ND.shape) == (0, WIDTH)
    assert not server.asked


def test_rows_recorded_before_the_server_failed_are_not_requested_again(
    tmp_path: Path, server: PoolingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, answered = TwoDocuments(), iter(range(100))
    monkeypatch.setattr(HiddenStateTeacher, "tokens_together", 24)  # one window at a time
    server.spoil = lambda status, content: (
        (400, b'{"error": {"message": "gone"}}') if next(answered) >= 2 else (status, content)
    )
    with pytest.raises(ModelError, match=r"rejects the request \(400\).*gone") as caught:
        # One request at a time, so that none reaches the server after the error was raised.
        record(teacher(server, concurrency=1), [windows], HIDDEN, tmp_path)
    assert "run the same command again to resume" in str(caught.value.fix)
    server.spoil = lambda status, content: (status, content)
    server.asked.clear()
    record(teacher(server), [windows], HIDDEN, tmp_path)
    assert sum(len(request["input"]) for request in server.asked) == 2


def normalized(status: int, content: bytes) -> tuple[int, bytes]:
    rows = torch.frombuffer(bytearray(content), dtype=torch.float32).view(-1, WIDTH)
    return status, torch.nn.functional.normalize(rows).numpy().tobytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda status, content: (status, content[:-4]), "bytes .* for .* tokens of width 32"),
        (lambda status, content: (status, content * 2), "bytes .* for .* tokens of width 32"),
        (lambda status, content: (status, content * 2000), "more than .* bytes"),
        (lambda status, content: (status, b"\xff" * len(content)), "not finite"),
        (normalized, "normalized to length 1"),
        (lambda *_: (401, b"{}"), "rejects the key"),
        (lambda *_: (404, b'{"detail": "Not Found"}'), "no POST /pooling"),
        (lambda *_: (302, b""), "redirects to another address"),
    ],
)
def test_an_invalid_reply_is_an_error_that_names_the_server(
    tmp_path: Path, server: PoolingServer, spoil: Any, message: str
) -> None:
    server.spoil = spoil
    with pytest.raises(ModelError, match=message) as caught:
        record(teacher(server), [TwoDocuments()], HIDDEN, tmp_path)
    assert server.base_url in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (ActivationRequest(frozenset({1})), "a term uses layer 1"),
        (ActivationRequest(attention=frozenset({1})), "a term compares attention"),
    ],
)
def test_unsupported_terms_are_rejected_before_the_server_is_called(
    server: PoolingServer, needs: ActivationRequest, message: str
) -> None:
    served = teacher(server)
    served.prepare(TeacherNeeds((Term("reverse_kl", temperature=2.0),)))
    with pytest.raises(SignalError, match=message) as caught:
        served.prepare(TeacherNeeds((), needs))
    assert caught.value.fix
    assert not server.asked


def test_a_server_also_scores_the_students_own_text(tmp_path: Path) -> None:
    encoding: dict[str, Any] = {"kind": "hidden"}
    tiny.save_model(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.text(400))
    pooling = PoolingServer(tiny.llama())
    with serving(pooling):
        signals = {"encoding": encoding, "server": {"base_url": pooling.base_url, "model": "tiny"}}
        own = {"on_policy": {"max_tokens": 8}}
        path = write(tmp_path, signals=signals, train=own)
        stored = StoredSignals(record_signals(path), "key")
        job = find_models(load_language_model_recipe(path), tmp_path)
        student = Student(tiny.llama(seed=1), tiny.tokenizer())
        found = training_teacher(job, stored, student)
        assert found is not None
        batch = batch_of(TwoDocuments())
        (signal,) = found.for_own_text().answer(batch).signals
    (expected,) = LocalTeacher(pooling.model).answer(batch).signals
    assert isinstance(signal, DenseSignal)
    assert isinstance(expected, DenseSignal)
    torch.testing.assert_close(signal.hidden_ND, expected.hidden_ND, rtol=1e-5, atol=1e-5)


# --- vLLM on this machine ------------------------------------------------------------------------


@pytest.fixture(params=["this Python", pytest.param("another Python", marks=pytest.mark.slow)])
def stub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The section `signals.vllm` for the stub, a package `vllm` in site/."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    if request.param == "another Python":
        return {"python": sys.executable}
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    return {}


def write(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    raw = tiny.recipe(folder, name=name, folder=str(folder / "runs" / name), **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def stub_log(folder: Path, name: str) -> list[Any]:
    lines = (folder / "site" / "vllm" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def shard_rows(store: Path) -> tuple[tuple[bytes, ...], torch.Tensor]:
    """The keys of a store's only shard, and its rows in bfloat16."""
    (file,) = (store / "shards").iterdir()
    shard = open_shard(file, read_settings(store))
    return read_keys(file), torch.from_numpy(shard.rows.bits_NW.copy()).view(torch.bfloat16)


def test_a_recipe_records_the_layers_of_its_terms_with_vllm(
    tmp_path: Path, stub: dict[str, Any]
) -> None:
    hidden = {"kind": "hidden"}
    signals = {"encoding": hidden, "vllm": {**stub, "context": 64}}
    store = record_signals(write(tmp_path, objective=TERMS, signals=signals))
    local = record_signals(
        write(tmp_path, name="local", objective=TERMS, signals={"encoding": hidden})
    )
    one, other = open_store(store), open_store(local)
    assert one.settings.encoding == other.settings.encoding == Hidden((1, 2, LAST), WIDTH)
    assert one.manifest.rows == other.manifest.rows
    (opened,) = stub_log(tmp_path, "opened")
    assert opened["runner"] == "pooling"
    assert opened["enforce_eager"]
    assert opened["max_model_len"] == 64
    (keys, bits_NW), (same_keys, same_NW) = shard_rows(store), shard_rows(local)
    assert keys == same_keys
    torch.testing.assert_close(bits_NW, same_NW, rtol=2**-6, atol=1e-3)


def test_top_tokens_are_recorded_from_hidden_states_of_vllm(
    tmp_path: Path, stub: dict[str, Any]
) -> None:
    top = {"kind": "top_k", "k": 4}
    store = record_signals(write(tmp_path, signals={"encoding": top, "vllm": stub}))
    local = record_signals(write(tmp_path, name="local", signals={"encoding": top}))
    one, other = (open_store(path).manifest.quality.captured_mass for path in (store, local))
    assert one == pytest.approx(other, abs=1e-5)
    assert not stub_log(tmp_path, "opened")[0].get("enforce_eager")


def test_rows_recorded_before_vllm_failed_are_not_read_again(
    tmp_path: Path, stub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HiddenStateTeacher, "tokens_together", 320)
    path = write(tmp_path, signals={"encoding": {"kind": "hidden"}, "vllm": stub})
    site = tmp_path / "site" / "vllm"
    (site / "fail").write_text("3")
    with pytest.raises(ModelError, match="CUDA out of memory") as caught:
        record_signals(path)
    assert caught.value.where == "signals.vllm"
    before = stub_log(tmp_path, "read")
    (site / "fail").unlink()
    manifest = open_store(record_signals(path)).manifest
    assert len(before) == 3
    assert sum(map(len, stub_log(tmp_path, "read"))) == manifest.segments


def test_an_architecture_whose_layers_do_not_give_the_output_is_rejected(
    tmp_path: Path, stub: dict[str, Any]
) -> None:
    path = write(tmp_path, objective=TERMS, signals={"encoding": {"kind": "hidden"}, "vllm": stub})
    (tmp_path / "site" / "vllm" / "odd").touch()
    with pytest.raises(ModelError, match="the layers of this architecture cannot be read"):
        record_signals(path)


def test_check_reports_a_missing_vllm(tmp_path: Path) -> None:
    signals = {"encoding": {"kind": "hidden"}, "vllm": {"python": "nowhere/python"}}
    path = write(tmp_path, signals=signals)
    (found,) = (one for one in check_recipe(path) if one.topic == "vLLM")
    assert (found.level, "cannot be run" in found.text) == ("error", True)
    without = write(tmp_path, name="without", signals={**signals, "vllm": {}})
    (found, *_) = (one for one in check_recipe(without) if one.topic == "vLLM")
    assert found.text == "vLLM is not installed"
    assert "signals.server" in (found.fix or "")


def test_a_server_for_intermediate_layers_is_rejected_by_check(tmp_path: Path) -> None:
    server = {"base_url": "http://127.0.0.1:9/v1", "model": "tiny"}
    signals = {"encoding": {"kind": "hidden"}, "server": server}
    found = check_recipe(write(tmp_path, objective=TERMS, signals=signals))
    (error,) = (one for one in found if one.level == "error")
    assert "a server returns only the last hidden states, but a term uses layer 1, 2" in error.text
    assert "signals.vllm" in (error.fix or "")


def test_intermediate_layers_of_a_divided_vllm_are_rejected_by_check(tmp_path: Path) -> None:
    signals = {"encoding": {"kind": "hidden"}, "vllm": {"pipeline_parallel": 2}}
    found = check_recipe(write(tmp_path, objective=TERMS, signals=signals))
    errors = [one for one in found if one.level == "error" and one.topic != "vLLM"]
    (error,) = errors
    assert "with pipeline_parallel, vLLM returns only the last hidden states" in error.text


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ({"vllm": {}, "store": "x"}, "a finished store is only read"),
        (
            {"vllm": {}, "server": {"base_url": "http://x/v1", "model": "m"}},
            "one of server and vll",
        ),
    ],
)
def test_contradictory_sources_of_signals_are_rejected(
    tmp_path: Path, signals: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tiny.recipe(tmp_path, signals=signals))
