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
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.record_store import segments_of
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView

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
        self._parameters = parameters

    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        """See `Teacher.answer`.

        Raises ModelError if the engine fails or returns something other than hidden states of these
        tokens. SignalError if it cannot return a requested layer.
        """
        self._check(request)
        last = self._last_layer
        wanted = sorted(request.layers | (frozenset() if self._head is None else {last}))
        ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten()
        own = labels.device if self._head is None else self._head.weight_VD.device
        device = self._device or own
        spans = segments_of(batch).spans
        # The last token of a segment predicts nothing in it.
        prompts = [ids[start : end - 1] for start, end in spans]
        rows: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
        for (start, end), found in zip(spans, self._read(prompts, wanted), strict=True):
            # The row at t - 1 predicts the token at t.
            chosen_N = (labels[start + 1 : end] != IGNORED).nonzero()[:, 0].cpu()
            for layer in wanted:
                rows[layer].append(found[layer][chosen_N])
        width = self.config.get_text_config().hidden_size
        empty_ND = torch.empty(0, width)
        layers = {
            layer: torch.cat(parts).to(device) if parts else empty_ND.to(device)
            for layer, parts in rows.items()
        }
        signals: tuple[DenseSignal, ...] = ()
        if self._head is not None:
            signals = (DenseSignal(layers[last].to(self._head.weight_VD.dtype), self._head),)
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

    @property
    def _last_layer(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def _check(self, request: ActivationRequest) -> None:
        if request.attention:
            raise SignalError(
                f"a term compares attention, and {self.described} returns only hidden states",
                where="objective.terms",
                fix="use a local teacher, or terms on the output and on hidden states",
            )
        check_layers(self.source, request.layers - {self._last_layer})

    def _read(
        self, prompts: Sequence[list[int]], layers: Sequence[int]
    ) -> list[Mapping[int, Tensor]]:
        if not prompts:
            return []
        answers = self.source.read(prompts, layers)
        width, last = self.config.get_text_config().hidden_size, self._last_layer
        for prompt, found in zip(prompts, answers, strict=True):
            for layer, hidden_LD in found.items():
                if tuple(hidden_LD.shape) != (len(prompt), width):
                    raise _wrong(
                        self.source,
                        f"hidden states of shape {list(hidden_LD.shape)} for {len(prompt)} tokens "
                        f"of width {width}",
                    )
                if not torch.isfinite(hidden_LD).all():
                    raise _wrong(self.source, f"hidden states of layer {layer} that are not finite")
                if layer == last and _are_normalized(hidden_LD):
                    raise _wrong(self.source, "hidden states normalized to length 1")
        return answers


def check_layers(source: HiddenStateSource, layers: frozenset[int]) -> None:
    """Raise SignalError if the engine cannot return one of these layers."""
    lacking = sorted(layers - source.layers)
    if lacking:
        raise SignalError(
            f"a term uses layer {', '.join(map(str, lacking))}, and {source.described} returns "
            "only the last hidden states",
            where="objective.terms",
            fix="run vLLM in the process instead (signals.vllm), use a local teacher, or use only "
            "terms on the output",
        )


def _are_normalized(hidden_LD: Tensor) -> bool:
    lengths_L = hidden_LD.float().norm(dim=-1)
    return bool(((lengths_L - 1).abs() < NORMALIZED).all())


def _wrong(source: HiddenStateSource, what: str) -> ModelError:
    return ModelError(
        f"the engine returned {what}",
        where=source.described,
        fix="run the recipe's teacher in vLLM as a pooling model; see docs/signal-store.md for the "
        "command",
    )
