"""Prompt log-probabilities from a server fill the same store as a local teacher."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.cli.stop_signals import Stopped, raise_on_signals
from stillhouse.data.data import Data
from stillhouse.errors import EndpointError, ModelError, SignalError
from stillhouse.objectives import Term
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.python_api import record as record_signals
from stillhouse.signals.encodings import TopK
from stillhouse.signals.manifest import Settings
from stillhouse.signals.signals_config import SignalServer
from stillhouse.signals.store import open_store
from stillhouse.students.student import Student
from stillhouse.teachers import served_teacher, signal_server
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.http_link import Patience
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.record_store import record, segments_of
from stillhouse.teachers.served_teacher import ServedTeacher
from stillhouse.teachers.teacher import Teacher, TeacherNeeds
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe
from tests import tiny
from tests.forks import Fork

pytestmark = pytest.mark.run

K = 5
SETTINGS = Settings(TopK(K), len(tiny.tokenizer()), {"teacher": "tiny"})


class Server(ThreadingHTTPServer):
    """Serves `prompt_logprobs` of the tiny model like vLLM; `spoil` changes its replies.

    cut_off: the number of following replies that end early.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = tiny.llama()
        self.asked: list[dict[str, Any]] = []
        self.spoil: Any = lambda status, answer: (status, answer)
        self.lock = threading.Lock()
        self.cut_off = 0

    @property
    def section(self) -> SignalServer:
        return SignalServer(base_url=f"http://127.0.0.1:{self.server_port}/v1", model="tiny")

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked.append(request)
            choices = [
                {"index": index, "text": "", "finish_reason": "length", "logprobs": None,
                 "prompt_logprobs": self.positions(ids, request["prompt_logprobs"])}
                for index, ids in enumerate(request["prompt"])
            ]  # fmt: skip
        return {"id": "1", "object": "text_completion", "created": 0, "model": "tiny",
                "choices": choices[::-1]}  # fmt: skip

    @torch.no_grad()
    def positions(self, ids: list[int], k: int) -> list[Any]:
        log_p_LV = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        positions: list[Any] = [None]
        for log_p_V, token in zip(log_p_LV, ids[1:], strict=False):
            chosen = {*log_p_V.topk(k).indices.tolist(), token}
            positions.append({str(i): {"logprob": float(log_p_V[i])} for i in chosen})
        return positions


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.spoil(200, self.server.answer(request))
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.server.lock:
            self.server.cut_off -= 1
            cut_off = self.server.cut_off >= 0
        if cut_off:
            self.close_connection = True
            body = body[:-9]
        with suppress(ConnectionError):  # the client does not read a huge reply to its end
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def teacher(section: SignalServer) -> ServedTeacher:
    return ServedTeacher(section, k=K, vocabulary=SETTINGS.vocabulary)


def one_batch() -> dict[str, torch.Tensor]:
    return {name: rows[None] for name, rows in TwoDocuments()[0].items()}


class TwoDocuments:
    """Windows of two documents each, of which the first four tokens are not supervised."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids_L = torch.randint(4, 200, (24,), generator=torch.Generator().manual_seed(index))
        labels_L = ids_L.clone()
        labels_L[:4] = labels_L[10] = -100
        positions_L = torch.cat([torch.arange(10), torch.arange(14)])
        return {"input_ids": ids_L, "labels": labels_L, "position_ids": positions_L}


def test_a_server_fills_the_same_store_as_a_local_teacher(tmp_path: Path, server: Server) -> None:
    windows = TwoDocuments()
    record(LocalTeacher(server.model), [windows], SETTINGS, tmp_path / "local")
    record(teacher(server.section), [windows], SETTINGS, tmp_path / "served")
    documents = [len(ids) for request in server.asked for ids in request["prompt"]]
    assert sorted(documents) == [10, 10, 10, 14, 14, 14]
    signals = []
    for name in ("local", "served"):
        store = open_store(tmp_path / name)
        batch = {key: torch.stack([windows[i][key] for i in range(3)]) for key in windows[0]}
        signals.append(store.read(segments_of(batch)))
        assert store.manifest.rows == 3 * (24 - 5)
    local, served = signals
    assert torch.equal(local.ids_NK, served.ids_NK)
    torch.testing.assert_close(local.log_probs_NK, served.log_probs_NK, atol=2e-3, rtol=0)
    torch.testing.assert_close(local.tail_N, served.tail_N, atol=1e-5, rtol=0)
    masses = [open_store(tmp_path / n).manifest.quality.captured_mass for n in ("local", "served")]
    assert masses[0] == pytest.approx(masses[1], abs=1e-5)


def test_a_request_contains_several_documents(tmp_path: Path, server: Server) -> None:
    """As many as a request may have, or fewer, so that all connections are in use."""
    section = server.section.model_copy(update={"concurrency": 2})
    record(teacher(section), [TwoDocuments()], SETTINGS, tmp_path)
    assert sorted(len(request["prompt"]) for request in server.asked) == [3, 3]


def test_rows_recorded_before_the_server_failed_are_not_requested_again(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = TwoDocuments()
    answers = iter(range(100))

    def fails_after_two(status: int, answer: Any) -> tuple[int, Any]:
        return (400, {"error": {"message": "gone"}}) if next(answers) >= 2 else (status, answer)

    server.spoil = fails_after_two
    monkeypatch.setattr(ServedTeacher, "tokens_together", 24)  # one window at a time
    # One request at a time, so that none reaches the server after the error was raised.
    one = server.section.model_copy(update={"concurrency": 1})
    with pytest.raises(ModelError, match=r"rejects the request \(400\).*gone"):
        record(teacher(one), [windows], SETTINGS, tmp_path)
    server.spoil = lambda status, answer: (status, answer)
    server.asked.clear()
    record(teacher(server.section), [windows], SETTINGS, tmp_path)
    assert sum(len(request["prompt"]) for request in server.asked) == 2


def without_logprobs(status: int, answer: Any) -> tuple[int, Any]:
    del answer["choices"][0]["prompt_logprobs"]
    return status, answer


def of_other_tokens(status: int, answer: Any) -> tuple[int, Any]:
    positions = answer["choices"][0]["prompt_logprobs"]
    positions[5] = {"1": {"logprob": -0.1}}
    return status, answer


def of_more_than_one(status: int, answer: Any) -> tuple[int, Any]:
    for entry in answer["choices"][0]["prompt_logprobs"][6].values():
        entry["logprob"] = -0.1
    return status, answer


def malformed(**entry: Any) -> Any:
    def spoil(status: int, answer: Any) -> tuple[int, Any]:
        positions = answer["choices"][0]["prompt_logprobs"]
        positions[6] = dict.fromkeys(positions[6], entry)
        return status, answer

    return spoil


def twice(status: int, answer: Any) -> tuple[int, Any]:
    """The same token occurs under two spellings of its id."""
    positions = answer["choices"][0]["prompt_logprobs"]
    first, *others = sorted(positions[6].items(), key=lambda item: -item[1]["logprob"])[:K]
    positions[6] |= dict(others[:-1]) | {f"0{first[0]}": first[1]}
    return status, answer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (malformed(logprob=None), "are malformed"),
        (malformed(logprob="x"), "are malformed"),
        (malformed(rank=1), "are malformed"),
        (malformed(logprob=float("nan")), "total probability of"),
        (malformed(logprob=10**400), "are malformed"),
        (twice, "4 tokens"),
        (lambda *_: (200, {"choices": None}), "no prompt_logprobs"),
        (lambda *_: (200, None), "no prompt_logprobs"),
        (lambda *_: (200, {"choices": [{"prompt_logprobs": {"0": 1}}]}), "no prompt_logprobs"),
        (lambda *_: (200, [[]]), "no prompt_logprobs"),
        (lambda *_: (302, {}), "redirects to another address, but prompts and the key"),
        (lambda *_: (401, {"error": {"message": "no"}}), "rejects the key"),
        (lambda *_: (404, {"error": {"message": "no such model"}}), "no such model"),
        (lambda *_: (400, {"error": {"message": "max 3 logprobs"}}), "max 3 logprobs"),
        (without_logprobs, "returned no prompt_logprobs"),
        (of_other_tokens, "do not contain that token"),
        (of_more_than_one, "total probability of"),
    ],
)
def test_an_invalid_reply_is_an_error_that_names_the_server(
    tmp_path: Path, server: Server, spoil: Callable[[int, Any], tuple[int, Any]], message: str
) -> None:
    server.spoil = spoil
    with pytest.raises(ModelError, match=message) as caught:
        record(teacher(server.section), [TwoDocuments()], SETTINGS, tmp_path)
    assert server.section.base_url in str(caught.value)
    assert caught.value.fix


def test_the_key_is_read_from_the_environment_and_reported_if_missing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = server.section.model_copy(update={"key_env": "TINY_KEY"})
    monkeypatch.delenv("TINY_KEY", raising=False)
    with pytest.raises(EndpointError, match="TINY_KEY is not set") as caught:
        teacher(section)
    assert "signals.server.key_env" in str(caught.value)
    monkeypatch.setenv("TINY_KEY", "secret")
    (found,) = teacher(section).answer(one_batch()).signals
    assert len(found.ids_NK) == segments_of(one_batch()).rows


KEY = "sk-live/Ab+9_z&Qx==7f3c"


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 418])
def test_a_key_that_a_server_repeats_is_not_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The key may be complete, escaped, or truncated."""
    monkeypatch.setenv("TINY_KEY", KEY)
    section = server.section.model_copy(update={"key_env": "TINY_KEY"})
    for said in (KEY, KEY.replace("/", "\\/"), KEY[:-3]):
        server.spoil = lambda *_, said=said: (status, {"error": {"message": f"{said} is wrong"}})
        with pytest.raises(ModelError) as caught:
            teacher(section).answer(one_batch())
        assert KEY[:10] not in str(caught.value).replace("\\", "")
        assert status == 302 or "[key]" in str(caught.value)


def test_a_huge_reply_is_not_read_to_its_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_teacher, "MOST_BYTES", 1 << 10)
    server.spoil = lambda status, answer: (status, {**answer, "more": " " * (1 << 20)})
    with pytest.raises(ModelError, match=r"reply has more than [0-9,]+ bytes"):
        teacher(server.section).answer(one_batch())


def test_a_reply_that_ends_early_is_requested_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal_server, "PATIENCE", Patience(attempts=3, backoff=0.0))
    server.cut_off = 2
    (found,) = teacher(server.section).answer(one_batch()).signals
    assert len(found.ids_NK) == segments_of(one_batch()).rows
    assert len(server.asked) == 2 + 2


def test_a_server_whose_replies_all_end_early_is_reported(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal_server, "PATIENCE", Patience(attempts=3, backoff=0.0))
    server.cut_off = 1000
    with pytest.raises(ModelError, match="its reply ended early"):
        teacher(server.section).answer(one_batch())
    assert 3 <= len(server.asked) <= 3 * 2  # the first of two requests that gives up ends both


def test_a_teacher_answers_inside_a_running_event_loop(server: Server) -> None:
    async def cell() -> Any:
        return teacher(server.section).answer(one_batch())

    (found,) = asyncio.run(cell()).signals
    assert len(found.ids_NK) == segments_of(one_batch()).rows


def _ask(section: SignalServer) -> None:
    raise_on_signals()
    try:
        teacher(section).answer(one_batch())
    except Stopped as stopped:
        sys.exit(128 + stopped.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_signal_does_not_wait_for_a_hanging_server(server: Server, number: int) -> None:
    free = threading.Event()
    server.spoil = lambda status, answer: (free.wait(60), (status, answer))[1]
    process = Fork(_ask, server.section)
    while len(server.asked) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    free.set()


def test_training_with_a_live_server_matches_its_store_and_a_local_teacher(
    tmp_path: Path, server: Server
) -> None:
    """The k tokens and their tail are rounded less than in a store."""
    words = tiny.tokenizer()
    lines = tiny.text(60).splitlines()
    data = Data.build(lines, words, context=32, heldout_tokens=128, train_tokens=400)
    served = ServedTeacher(server.section, k=200, vocabulary=260, tokenizer=words)
    section = TrainRecipe(batch_size=4, precision="float32", max_steps=3, evaluate_every=3)
    found = []
    recorded = record_signals(served, data, tmp_path)
    assert recorded.store.settings.encoding == TopK(served.k)
    local = LocalTeacher(server.model, words)
    teachers: list[Teacher] = [served, recorded, local]
    for taught_by in teachers:
        student = Student(tiny.llama(seed=1), words)
        result = train(
            student, taught_by, data.train, ObjectiveRecipe(), section, heldout=data.heldout
        )
        found.append([row["loss"] for row in result.metrics if "loss" in row])
        if taught_by is served:
            assert any("heldout_kl" in row for row in result.metrics)
    live, stored, whole = found
    assert live == pytest.approx(stored, rel=2e-3)
    assert live == pytest.approx(whole, rel=2e-2)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (TeacherNeeds((Term("forward_kl", temperature=2.0),)), "at temperature 1"),
        (TeacherNeeds((Term("adaptive_kl"),)), "adaptive_kl cannot be computed"),
        (TeacherNeeds((), ActivationRequest(frozenset({1}))), "intermediate layers"),
    ],
)
def test_unsupported_terms_are_rejected_before_the_server_is_called(
    server: Server, needs: TeacherNeeds, message: str
) -> None:
    with pytest.raises(SignalError, match=message) as caught:
        teacher(server.section).prepare(needs)
    assert caught.value.fix
    assert not server.asked


def test_a_note_says_that_only_the_most_likely_tokens_are_used(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher(server.section).prepare(TeacherNeeds((Term("forward_kl"),)))
    assert "5 most likely tokens" in capfd.readouterr().err
