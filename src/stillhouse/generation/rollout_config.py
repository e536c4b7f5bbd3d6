"""Engines that write a student's text during its training: a section of `train.on_policy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.field_types import Divergence, PathText, Share
from stillhouse.section import Section
from stillhouse.signals.signals_config import SignalServer
from stillhouse.vllm_config import VllmEngine

TOLERANCE: float = Field(
    0.05,
    description="Nats per token by which the engine's log-probabilities may differ from the "
    "student's, on average over a row, after its weights were handed over; more stop the run.",
)


class LocalRollouts(Section):
    """The student writes in this process, with the weights that are trained."""

    kind: Literal["local"] = "local"


class VllmRollouts(VllmEngine):
    """vLLM on this machine: it sleeps while the student is trained."""

    kind: Literal["vllm"]
    gpu_memory: Share = Field(
        0.3, description="Share of each GPU's memory that vLLM may use while it writes."
    )
    tolerance: Divergence = TOLERANCE


class VllmServerRollouts(SignalServer):
    """A vLLM server, started with VLLM_SERVER_DEV_MODE=1, that generates text."""

    kind: Literal["vllm_server"]
    weights: PathText = Field(
        description="A folder that this machine and the server have under the same path; the "
        "weights are handed over in it, best in memory."
    )
    tolerance: Divergence = TOLERANCE

    def folder(self, base: Path) -> Path:
        """Of the weights. base: the recipe's folder, where a relative path starts."""
        return (base / self.weights).absolute()


RolloutsRecipe = Annotated[
    LocalRollouts | VllmRollouts | VllmServerRollouts, Field(discriminator="kind")
]
