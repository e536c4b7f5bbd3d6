"""Hidden states from a vLLM server that runs the teacher as a pooling model.

`POST /pooling` with the task token_embed returns the last hidden states, after the final norm, for
every token of every prompt, as the concatenated bytes of all rows.

Shapes: L tokens of a prompt, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.signal_server import Post, SignalLink, divide

EXTRA_BYTES = 1 << 20
"""Bytes that a reply can have beyond twice the expected size, so that a server with a wrong model
is reported as such."""
REQUEST_BYTES = 1 << 26
"""Maximum size of a reply, unless a single prompt needs more."""
COMMAND = (
    "vllm serve MODEL --runner pooling --convert embed --pooler-config "
    '\'{"task": "token_embed", "use_activation": false}\''
)


class HiddenStateServer:
    """Reads the last hidden states from a server, in `dtype` (float32 or bfloat16).

    last: number of the last layer. width: of a hidden state. Raises EndpointError: the API key's
    environment variable is not set.
    """

    layers: frozenset[int] = frozenset()

    def __init__(self, server: SignalServer, *, last: int, width: int, dtype: torch.dtype) -> None:
        self.server, self.last, self.width, self.dtype = server, last, width, dtype
        fix = f"start vLLM with {COMMAND}, and a --max-model-len of at least data.context"
        self._link = SignalLink(server, missing="POST /pooling", rejected=fix)
        self.described = self._link.described

    def read(
        self, prompts: Sequence[list[int]], layers: Sequence[int]
    ) -> list[Mapping[int, Tensor]]:
        """See `HiddenStateSource`."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = max(1, REQUEST_BYTES // (self.width * self.dtype.itemsize))
        requests = divide(prompts, lengths, tokens, self.server.concurrency)
        answers = self._link.each(requests, self._send)
        found = [hidden_LD for answer in answers for hidden_LD in answer]
        return [{self.last: hidden_LD} for hidden_LD in found] if layers else [{} for _ in found]

    async def _send(self, post: Post, prompts: Sequence[list[int]]) -> list[Tensor]:
        payload = {
            "model": self.server.model,
            "task": "token_embed",
            "input": prompts,
            "use_activation": False,  # True would normalize
            "encoding_format": "bytes_only",
            "embed_dtype": str(self.dtype).removeprefix("torch."),
            "endianness": "little",
        }
        lengths = [len(prompt) for prompt in prompts]
        expected = sum(lengths) * self.width * self.dtype.itemsize
        content = await post(f"{self._link.root}/pooling", payload, 2 * expected + EXTRA_BYTES)
        if len(content) != expected:
            raise self._link.error(
                f"the server returned {len(content)} bytes instead of {expected} for "
                f"{sum(lengths)} tokens of width {self.width}",
                f"check that it runs the recipe's teacher: {COMMAND}",
            )
        rows_LD = torch.frombuffer(bytearray(content), dtype=self.dtype).view(-1, self.width)
        return list(rows_LD.split(lengths))
