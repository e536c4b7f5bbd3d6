"""Generates token ids on a vLLM server, and replaces the weights of its model.

Weights are replaced with vLLM's `reload_weights`, which reads a checkpoint from the server's disk.
Its endpoint exists only if the server was started with VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.generation.rollout_config import VllmServerRollouts
from stillhouse.generation.vllm_engine import ROLLOUTS
from stillhouse.teachers.signal_server import Post, SignalLink

COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT"
MOST_BYTES, MOST_BYTES_PER_TOKEN = 1 << 20, 1 << 10
"""Maximum size of a reply: a constant, plus an amount per token."""


class VllmServer:
    """A `WeightEngine` on a server. Raises EndpointError if the key's variable is not set."""

    window = 0

    def __init__(self, section: VllmServerRollouts) -> None:
        self.section = section
        self._link = SignalLink(
            section,
            missing="endpoint",
            rejected=f"start it with {COMMAND}",
            section=ROLLOUTS,
        )

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `vllm_worker.generate`. Up to `concurrency` requests are in flight at a time.

        Raises ModelError.
        """
        return self._link.each(rows, self._write)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a checkpoint in a folder that the server can read.

        Raises ModelError.
        """
        arguments = {"weights_path": str(folder)}
        self._call("collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self._call("reset_prefix_cache", {})  # it was computed with the old weights

    async def _write(self, post: Post, row: dict[str, Any]) -> dict[str, Any]:
        sampling = {name: value for name, value in row["sampling"].items() if value is not None}
        named = {"model": self.section.model, "prompt": row["prompt"], "return_token_ids": True}
        tokens = len(row["prompt"]) + row["sampling"]["max_tokens"]
        most = MOST_BYTES + MOST_BYTES_PER_TOKEN * tokens
        body = await post("completions", {**named, **sampling}, most)
        try:
            (choice,) = json.loads(body)["choices"]
            logprobs = choice["logprobs"] and choice["logprobs"]["token_logprobs"]
            return {
                "text": choice["text"],
                "ids": [int(token) for token in choice["token_ids"]],
                "stop": str(choice["finish_reason"]),
                "logprobs": logprobs and [float(one) for one in logprobs],
            }
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise self._link.error(
                f"the server's answer has no token ids ({type(error).__name__}: {error})",
                "use vLLM 0.29 or newer, which supports return_token_ids in completions",
            ) from error

    def _call(self, endpoint: str, body: Mapping[str, Any]) -> None:
        async def call(post: Post, url: str) -> bytes:
            return await post(url, body, MOST_BYTES)

        self._link.each([f"{self._link.root}/{endpoint}"], call)
