"""Transferring weights to fake vLLM engines, and detecting engines that have different weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stillhouse.errors import ModelError, RunError
from stillhouse.generation import vllm_rollouts as rollouts_module
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.rollout_config import VllmRollouts, VllmServerRollouts
from stillhouse.generation.vllm_rollouts import (
    hand_over,
    log_probabilities,
    save_weights,
    server_rollouts,
    vllm_rollouts,
)
from tests import tiny
from tests.teachers.hidden_engine import serving

pytestmark = pytest.mark.run

ENDS = frozenset({0})


class FakeEngine:
    """Generates with transformers. ignores_weights: keeps its old weights when it gets new ones.
    asleep: has released its weights."""

    window = 256

    def __init__(self, folder: Path) -> None:
        self.ignores_weights = False
        self.asleep = self.closed = False
        self.opened: list[Path] = []
        self.read(folder)

    def read(self, folder: Path) -> None:
        self.opened.append(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def load_weights(self, folder: Path) -> None:
        self.asleep = False
        if not self.ignores_weights:
            self.read(folder)

    def sleep(self) -> None:
        self.asleep = True

    def close(self) -> None:
        self.closed = True

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert not self.asleep
        found = []
        for row in rows:
            sampling = row["sampling"]
            ends = frozenset() if sampling.get("ignore_eos") else ENDS
            prompt = TokenPrompt(
                row["prompt"], sampling["max_tokens"], temperature=sampling["temperature"],
                seed=sampling.get("seed") or 0, logprobs=sampling["logprobs"] is not None,
            )  # fmt: skip
            ((_, one),) = LocalGenerator(self.model, ends).generate([prompt])
            found.append(
                {"text": "", "ids": list(one.ids), "stop": one.stop, "logprobs": one.logprobs}
            )
        return found


def trained(model: Any, amount: float) -> Any:
    """Changes every weight, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn_like(parameter)
    return model


def test_an_engine_with_the_students_weights_agrees(tmp_path: Path) -> None:
    model = tiny.llama()
    save_weights(model, tmp_path)
    engine = FakeEngine(tmp_path)
    trained(model, 0.02)
    assert hand_over(engine, model, tmp_path, tolerance=1e-4) < 1e-5


def test_an_engine_that_keeps_its_old_weights_stops_the_run(tmp_path: Path) -> None:
    model = tiny.llama()
    save_weights(model, tmp_path)
    engine = FakeEngine(tmp_path)
    engine.ignores_weights = True
    hand_over(engine, model, tmp_path, tolerance=1e-4)
    trained(model, 0.02)
    with pytest.raises(ModelError, match="it has different weights") as caught:
        hand_over(engine, model, tmp_path, tolerance=0.05)
    assert caught.value.where == "train.on_policy.generator"


def test_an_engine_without_log_probabilities_is_rejected(tmp_path: Path) -> None:
    model = tiny.llama()
    save_weights(model, tmp_path)
    engine = FakeEngine(tmp_path)
    write = engine.generate
    engine.generate = lambda rows: [{**one, "logprobs": None} for one in write(rows)]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="returns 0 log-probabilities for 32 tokens"):
        hand_over(engine, model, tmp_path, tolerance=1.0)


def test_an_engine_that_cannot_load_the_weights_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llama()
    save_weights(model, tmp_path)
    engine = FakeEngine(tmp_path)

    def fail(_: Path) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(engine, "load_weights", fail)
    with pytest.raises(ModelError, match=r"cannot load the student's .*CUDA out of memory"):
        hand_over(engine, model, tmp_path, tolerance=1.0)


def test_log_probabilities_equal_those_of_a_plain_forward_pass() -> None:
    model = tiny.llama()
    prompt, ids = [5, 6, 7], [8, 9]
    logits_LV = model(torch.tensor([[*prompt, *ids]])).logits[0].detach()
    expected = [float(logits_LV[at].log_softmax(-1)[token]) for at, token in ((2, 8), (3, 9))]
    assert log_probabilities(model, prompt, ids).tolist() == pytest.approx(expected, abs=1e-5)


def test_weights_are_written_in_the_engines_precision(tmp_path: Path) -> None:
    save_weights(tiny.llama(), tmp_path, torch.bfloat16)
    size = (tmp_path / "model.safetensors").stat().st_size
    save_weights(tiny.llama(), tmp_path)
    assert size < 0.6 * (tmp_path / "model.safetensors").stat().st_size


def test_a_tied_head_is_also_written_for_an_engine_that_keeps_both(tmp_path: Path) -> None:
    model = tiny.llama()
    save_weights(model, tmp_path, torch.bfloat16, head_too=True)
    head = load_file(tmp_path / "head.safetensors")["lm_head.weight"]
    assert torch.equal(head, model.lm_head.weight.to(torch.bfloat16))
    save_weights(model, tmp_path)
    assert not (tmp_path / "head.safetensors").exists()


def test_each_generation_uses_the_students_current_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[FakeEngine] = []

    def start(_section: Any, options: dict[str, Any], *_: Any, **__: Any) -> FakeEngine:
        assert options["skip_tokenizer_init"]
        started.append(FakeEngine(Path(options["model"])))
        return started[-1]

    monkeypatch.setattr(rollouts_module, "require_vllm", lambda *_, **__: None)
    monkeypatch.setattr(rollouts_module, "start_engine", start)
    model, prompts = tiny.llama(), [TokenPrompt([5, 6, n], 6) for n in (7, 8, 9)]
    section = VllmRollouts(kind="vllm", batch=2)
    with vllm_rollouts(section, tmp_path, base=tmp_path, seed=0) as opened:
        for _ in range(2):
            trained(model, 0.05)
            with opened(model, ENDS) as generator:
                written = dict(generator.generate(prompts))
            expected = dict(LocalGenerator(model, ENDS).generate(prompts))
            assert [list(written[n].ids) for n in range(3)] == [
                list(expected[n].ids) for n in range(3)
            ]
            assert started[0].asleep
        started[0].ignores_weights = True
        trained(model, 0.05)
        with pytest.raises(ModelError, match="it has different weights"), opened(model, ENDS):
            pass
    assert started[0].closed
    assert len(started) == 1


# --- a server ------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    server: GeneratingServer

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        self.server.asked.append(self.path)
        status, answer = self.server.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        return


class GeneratingServer(ThreadingHTTPServer):
    """A vLLM server in development mode, or in the usual mode, which has no /collective_rpc."""

    def __init__(self, folder: Path, *, development: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.development = FakeEngine(folder), development
        self.asked: list[str] = []

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            assert body["return_token_ids"]
            names = ("temperature", "max_tokens", "seed", "logprobs", "ignore_eos")
            sampling = {"logprobs": None, **{name: body[name] for name in names if name in body}}
            (one,) = self.engine.generate([{"prompt": body["prompt"], "sampling": sampling}])
            told = one["logprobs"] and {"token_logprobs": one["logprobs"]}
            choice = {"text": "", "token_ids": one["ids"], "finish_reason": one["stop"],
                      "logprobs": told}  # fmt: skip
            return 200, {"choices": [choice]}
        if not self.development:
            return 404, {"detail": "Not Found"}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.engine.load_weights(Path(body["kwargs"]["weights_path"]))
        return 200, {"results": [None]}


@pytest.fixture
def student(tmp_path: Path) -> Any:
    model = tiny.llama()
    save_weights(model, tmp_path / "start")
    return model


def section(server: GeneratingServer, weights: str) -> VllmServerRollouts:
    base_url = f"http://127.0.0.1:{server.server_port}/v1"
    return VllmServerRollouts(
        kind="vllm_server", base_url=base_url, model="student", weights=weights, concurrency=2
    )


@pytest.fixture
def server(tmp_path: Path, student: Any) -> Iterator[GeneratingServer]:
    found = GeneratingServer(tmp_path / "start")
    with serving(found):
        yield found


def test_a_server_generates_with_the_students_current_weights(
    tmp_path: Path, student: Any, server: GeneratingServer
) -> None:
    prompts = [TokenPrompt([5, 6, n], 6, logprobs=True) for n in (7, 8, 9)]
    trained(student, 0.05)
    with (
        server_rollouts(section(server, "weights"), base=tmp_path) as opened,
        opened(student, ENDS) as generator,
    ):
        written = dict(generator.generate(prompts))
    for number, one in LocalGenerator(student, ENDS).generate(prompts):
        assert list(written[number].ids) == list(one.ids)
        assert written[number].logprobs == pytest.approx(one.logprobs, abs=1e-4)
    assert server.asked[:2] == ["/collective_rpc", "/reset_prefix_cache"]


def test_a_server_that_keeps_its_old_weights_stops_the_run(
    tmp_path: Path, student: Any, server: GeneratingServer
) -> None:
    server.engine.ignores_weights = True
    trained(student, 0.05)
    rollouts = server_rollouts(section(server, "weights"), base=tmp_path)
    with (
        rollouts as opened,
        pytest.raises(ModelError, match="it has different weights"),
        opened(student, ENDS),
    ):
        pass


def test_the_error_for_a_server_without_development_mode_names_the_variable(
    tmp_path: Path, student: Any, server: GeneratingServer
) -> None:
    server.development = False
    with (
        server_rollouts(section(server, "weights"), base=tmp_path) as opened,
        pytest.raises(ModelError, match="no endpoint") as caught,
        opened(student, ENDS),
    ):
        pass
    assert "VLLM_SERVER_DEV_MODE=1" in (caught.value.fix or "")


def test_a_folder_with_another_model_is_not_overwritten(
    tmp_path: Path, student: Any, server: GeneratingServer
) -> None:
    before = {file: file.read_bytes() for file in (tmp_path / "start").iterdir()}
    with (
        pytest.raises(RunError, match="contains a model") as caught,
        server_rollouts(section(server, "start"), base=tmp_path),
    ):
        pass
    assert caught.value.where == str(tmp_path / "start")
    assert before == {file: file.read_bytes() for file in (tmp_path / "start").iterdir()}


def test_a_resumed_run_overwrites_the_weights_that_it_wrote_earlier(
    tmp_path: Path, student: Any, server: GeneratingServer
) -> None:
    for _ in range(2):
        with (
            server_rollouts(section(server, "weights"), base=tmp_path) as opened,
            opened(student, ENDS),
        ):
            pass
    assert (tmp_path / "weights" / "model.safetensors").exists()
