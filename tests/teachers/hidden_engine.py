"""A stand-in for vLLM's pooling models: a `vllm` module for a process, and a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

TERMS: dict[str, Any] = {
    "terms": [
        {"kind": "logits", "divergence": "reverse_kl", "temperature": 2.0},
        {"kind": "hidden_states", "layers": "uniform"},
    ]
}
"""An objective on the output and on two intermediate layers of the tiny teacher."""

STUB = '''
"""Runs prompts with transformers; blocks and outputs have vLLM's interface."""
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent


@dataclass
class PoolingParams:
    use_activation: bool = True


class Block(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, positions, hidden_states, residual, **more):
        if residual is not None:
            hidden_states = hidden_states + residual
        (after,) = self.block(hidden_states[None], position_ids=positions, **more)
        return after - 1.0, torch.ones_like(after)  # the output is the sum


class Inner(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(block) for block in model.layers)
        self.norm, self.embed, self.rotary = model.norm, model.embed_tokens, model.rotary_emb

    def forward(self, ids):
        hidden, residual = self.embed(ids), None
        size = len(ids)
        positions = torch.arange(size)[None]
        mask = torch.full((size, size), float("-inf")).triu(1)[None, None]
        rotary = self.rotary(hidden[None], positions)
        for layer in self.layers:
            hidden, residual = layer(
                positions, hidden, residual, attention_mask=mask, position_embeddings=rotary
            )
        scale = 2.0 if (HERE / "odd").exists() else 1.0
        return self.norm(hidden + residual) * scale


class Model(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.model = Inner(AutoModelForCausalLM.from_pretrained(path).eval().model)

    def forward(self, ids):
        return self.model(ids)


class LLM:
    def __init__(self, model, **options):
        with (HERE / "opened.jsonl").open("a") as file:
            file.write(json.dumps({"model": model, **options}) + "\\n")
        self.model = Model(model)
        self.read = 0
        config = SimpleNamespace(max_model_len=options["max_model_len"] or 256)
        self.llm_engine = SimpleNamespace(model_config=config)

    def collective_rpc(self, function):
        return [function(SimpleNamespace(get_model=lambda: self.model))]

    @torch.no_grad()
    def encode(self, prompts, pooling_params, pooling_task, use_tqdm):
        assert pooling_task == "token_embed"
        assert not pooling_params.use_activation
        self.read += 1
        if (HERE / "fail").exists() and self.read > int((HERE / "fail").read_text()):
            raise RuntimeError("CUDA out of memory")
        with (HERE / "read.jsonl").open("a") as file:
            file.write(json.dumps([len(one["prompt_token_ids"]) for one in prompts]) + "\\n")
        rows = [self.model(torch.tensor(one["prompt_token_ids"])) for one in prompts]
        return [SimpleNamespace(outputs=SimpleNamespace(data=one)) for one in rows]
'''


class PoolingServer(ThreadingHTTPServer):
    """Serves a model's hidden states like vLLM's /pooling; `spoil` changes its replies."""

    def __init__(self, model: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.asked: list[dict[str, Any]] = []
        self.spoil: Any = lambda status, content: (status, content)
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @torch.no_grad()
    def answer(self, request: dict[str, Any]) -> bytes:
        with self.lock:
            self.asked.append(request)
            rows = [
                self.model.model(torch.tensor([ids])).last_hidden_state[0]
                for ids in request["input"]
            ]
        assert request["encoding_format"] == "bytes_only"
        assert request["use_activation"] is False
        dtype = getattr(torch, request["embed_dtype"])
        return torch.cat(rows).to(dtype).view(torch.uint8).numpy().tobytes()


class _Handler(BaseHTTPRequestHandler):
    server: PoolingServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, content = 404, b'{"detail": "Not Found"}'
        if self.path == "/pooling":
            status, content = self.server.spoil(200, self.server.answer(request))
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(ConnectionError):  # the client does not read a huge reply to its end
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
