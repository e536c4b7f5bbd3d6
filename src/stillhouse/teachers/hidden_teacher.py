"""A teacher whose hidden states are computed by an inference engine; only its head is loaded here.

The head and the last hidden states, after the final norm, determine the teacher's full
distributions, so every divergence is exact, as with a local teacher.

Shapes: L tokens of a prompt, N supervised rows, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stillhouse.account import forward_flops
from stillhouse.data.batches import Batch, Batches
from stillhouse.data.shift import IGNORED
from stillhouse.errors import ModelError, SignalError
from stillhouse.signals import DenseSignal, LMHead
from stillhouse.signals.signals_config import SignalServer
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.record_store import segments_of
from stillhouse.teachers.signal_server import Post, SignalLink
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView

EXTRA_BYTES = 1 << 20
"""Bytes that a reply can have beyond twice the expected size, so that a server with a wrong model
is reported as such."""
REQUEST_BYTES = 1 << 26
"""Maximum size of a reply, unless a single prompt needs more."""
COMMAND = (
    "vllm serve MODEL --runner pooling --convert embed --pooler-config "
    '\'{"task": "token_embed", "use_activation": false}\''
)
NORMALIZED = 1e-3
"""How close to 1 the norm of every row must be to conclude that an engine has normalized them."""


class HiddenStateSource(Protocol):
    """An engine that computes hidden states of prompts.

    described: one line for messages. layers: the layers that it can return besides the last one.
    """

    @property
    def described(self) -> str: ...

    @property
    def layers(self) -> frozenset[int]: ...

    def read(
        self, prompts: Sequence[list[int]], layers: Sequence[int]
    ) -> list[Mapping[int, Tensor]]:
        """Compute the hidden states [L, D] of each prompt, by layer. Raises ModelError."""
        ...


class HiddenStateServer:
    """Reads the last hidden states from a vLLM server, in `dtype` (float32 or bfloat16).

    `POST /pooling` with the task token_embed returns them for every token of every prompt, as the
    concatenated bytes of all rows.
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
        tokens = max(1, REQUEST_BYTES // (self.width * self.dtype.itemsize))
        found = self._link.each_prompt(prompts, tokens, self._send)
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


class HiddenStateTeacher(Teacher):
    """A teacher whose hidden states come from an engine.

    source: the engine. config: the model's configuration. vocabulary: number of ids that the
    student has too. head: the model's head, on the device where full distributions are needed;
    None: hidden states only, to be stored. parameters: the model's size, a tied head counted once,
    for the FLOPs in the report (0: not counted).
    """

    tokens_together = 1 << 14

    def __init__(
        self,
        source: HiddenStateSource,
        config: Any,
        *,
        vocabulary: int,
        tokenizer: Any = None,
        head: LMHead | None = None,
        parameters: int = 0,
    ) -> None:
        self.source, self.vocabulary = source, vocabulary
        self.described = self.fingerprint = source.described
        self.config, self.tokenizer, self._head = config, tokenizer, head
        text = config.get_text_config()
        self._last, self._width = int(text.num_hidden_layers), int(text.hidden_size)
        self._parameters = parameters

    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        """See `Teacher.answer`.

        Raises ModelError if the engine fails or returns something other than hidden states of these
        tokens. SignalError if it cannot return a requested layer.
        """
        self._check(request)
        wanted = sorted(request.layers | (frozenset() if self._head is None else {self._last}))
        ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten()
        own = labels.device if self._head is None else self._head.weight_VD.device
        device = self._device or own
        spans = segments_of(batch).spans
        # The last token of a segment predicts nothing in it.
        answers = self._read([ids[start : end - 1] for start, end in spans], wanted)
        # The row at t - 1 predicts the token at t.
        supervised = (labels != IGNORED).cpu()
        taught = [supervised[start + 1 : end].nonzero()[:, 0] for start, end in spans]
        empty_ND = torch.empty(0, self._width)
        layers = {}
        for layer in wanted:
            parts = [found[layer][at_N] for found, at_N in zip(answers, taught, strict=True)]
            layers[layer] = (torch.cat(parts) if parts else empty_ND).to(device)
        signals: tuple[DenseSignal, ...] = ()
        if self._head is not None:
            signals = (DenseSignal(layers[self._last].to(self._head.weight_VD.dtype), self._head),)
        return TeacherView(signals, {layer: layers[layer] for layer in request.layers})

    def prepare(self, needs: TeacherNeeds, text: Batches | None = None) -> None:
        super().prepare(needs, text)
        self._check(needs.activations)

    def place(self, device: torch.device, context: int) -> None:
        super().place(device, context)
        self._head = None if self._head is None else self._head.to(device)

    def flops(self, tokens: int) -> int:
        return forward_flops(self._parameters, tokens)

    def __repr__(self) -> str:
        return f"Teacher({self.described}: hidden states, {self.vocabulary:,} tokens)"

    def _check(self, request: ActivationRequest) -> None:
        if request.attention:
            raise SignalError(
                f"a term compares attention, and {self.described} returns only hidden states",
                where="objective.terms",
                fix="use a local teacher, or terms on the output and on hidden states",
            )
        lacking = sorted(request.layers - {self._last} - self.source.layers)
        if lacking:
            raise SignalError(
                f"a term uses layer {', '.join(map(str, lacking))}, and {self.described} returns "
                "only the last hidden states",
                where="objective.terms",
                fix="run vLLM in the process instead (signals.vllm), use a local teacher, or use "
                "only terms on the output",
            )

    def _read(
        self, prompts: Sequence[list[int]], layers: Sequence[int]
    ) -> list[Mapping[int, Tensor]]:
        if not prompts:
            return []
        answers = self.source.read(prompts, layers)
        for prompt, found in zip(prompts, answers, strict=True):
            for layer, hidden_LD in found.items():
                if tuple(hidden_LD.shape) != (len(prompt), self._width):
                    shape = list(hidden_LD.shape)
                    wrong = f"of shape {shape} for {len(prompt)} tokens of width {self._width}"
                elif not torch.isfinite(hidden_LD).all():
                    wrong = f"of layer {layer} that are not finite"
                elif layer == self._last and _are_normalized(hidden_LD):
                    wrong = "normalized to length 1"
                else:
                    continue
                raise ModelError(
                    f"the engine returned hidden states {wrong}",
                    where=self.described,
                    fix="run the recipe's teacher in vLLM as a pooling model; see "
                    "docs/signal-store.md for the command",
                )
        return answers


def _are_normalized(hidden_LD: Tensor) -> bool:
    lengths_L = hidden_LD.float().norm(dim=-1)
    return bool(((lengths_L - 1).abs() < NORMALIZED).all())
