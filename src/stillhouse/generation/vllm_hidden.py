"""Reads hidden states from vLLM on this machine.

Shapes: L tokens of a prompt, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.generation.vllm_engine import (
    SIGNALS,
    engine_options,
    require_vllm,
    start_engine,
    vllm_errors,
)
from stillhouse.generation.vllm_process import VllmProcess
from stillhouse.generation.vllm_worker import POOLING
from stillhouse.teachers.model_source import ModelSource
from stillhouse.vllm_config import VllmEngine


@dataclass
class VllmHiddenStates:
    """A source of hidden states in vLLM.

    kept: layers before the last one, in the order in which the engine returns them. last: number of
    the last layer.
    """

    engine: VllmProcess
    described: str
    kept: tuple[int, ...]
    last: int

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.kept)

    def read(
        self, prompts: Sequence[list[int]], layers: Sequence[int]
    ) -> list[Mapping[int, Tensor]]:
        """See `HiddenStateSource`."""
        longest = max(map(len, prompts), default=0)
        if longest > self.engine.window:
            raise ModelError(
                f"a document has {longest:,} tokens, but vLLM reads at most {self.engine.window:,}",
                where=SIGNALS,
                fix=f"set signals.vllm.context to at least {longest}, or lower data.context",
            )
        with vllm_errors("vLLM stopped", SIGNALS):
            found = self.engine.hidden_states(list(prompts))
        numbers = (*self.kept, self.last)
        return [
            {
                number: hidden_LD
                for number, hidden_LD in zip(numbers, each.chunk(len(numbers), -1), strict=True)
                if number in layers
            }
            for each in found
        ]


@contextmanager
def opened_hidden_states(
    section: VllmEngine,
    source: ModelSource,
    *,
    base: Path,
    layers: Sequence[int],
    last: int,
    seed: int,
) -> Iterator[VllmHiddenStates]:
    """Run a model in vLLM, which releases its memory at the end of the block.

    layers: layers to read. last: number of the model's last layer. Raises ModelError if a package
    is not installed, there are too few GPUs, or vLLM cannot load the model.
    """
    kept = tuple(sorted(set(layers) - {last}))
    require_vllm(section, base, where=SIGNALS)
    options = {**engine_options(section, source, seed=seed), **POOLING}
    if kept:
        options["enforce_eager"] = True  # hooks do not run in a compiled model
    with closing(start_engine(section, options, base, kept, where=SIGNALS)) as engine:
        yield VllmHiddenStates(engine, f"{source.path.name} in vLLM", kept, last)
