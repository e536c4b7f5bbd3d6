"""Text from a vLLM server as token ids, and new weights for its model.

Weights are replaced by vLLM's `reload_weights`, which reads a checkpoint from the server's disk.
The endpoint for it exists only in a server that was started with VLLM_SERVER_DEV_MODE=1.
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
"""Of a reply: in all, and additionally for each token."""


class VllmServer:
    """A `Writer`, whose weights can be replaced. Raises EndpointError: the key's variable is not
    set."""

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
        """As `vllm_worker.generate`; `concurrency` requests are under way at a time. Raises
        ModelError."""
        return self._link.each(rows, self._write)

    def load_weights(self, folder: Path) -> None:
        """Replace the model's weights by those of a checkpoint in a folder that the server sees.
        Raises ModelError."""
        arguments = {"weights_path": str(folder)}
        self._call("collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self._call("reset_prefix_cache", {})  # it holds what the old weights computed

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
                "use vLLM 0.29 or newer: its completions have return_token_ids",
            ) from error

    def _call(self, endpoint: str, body: Mapping[str, Any]) -> None:
        async def call(post: Post, url: str) -> bytes:
            return await post(url, body, MOST_BYTES)

        self._link.each([f"{self._link.root}/{endpoint}"], call)
