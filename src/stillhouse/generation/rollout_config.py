"""Sections for engines that generate a student's text during training (`train.on_policy`)."""

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
    description="Largest mean difference, in nats/token, between the engine's and the student's "
    "log-probabilities of a row after the weights were transferred; a larger one stops the run.",
)


class LocalRollouts(Section):
    """The student generates in this process, with the weights being trained."""

    kind: Literal["local"] = "local"


class VllmRollouts(VllmEngine):
    """vLLM on this machine; it sleeps while the student is trained."""

    kind: Literal["vllm"]
    gpu_memory: Share = Field(
        0.3, description="Share of each GPU's memory that vLLM may use while it generates."
    )
    tolerance: Divergence = TOLERANCE


class VllmServerRollouts(SignalServer):
    """A vLLM server, started with VLLM_SERVER_DEV_MODE=1, that generates text."""

    kind: Literal["vllm_server"]
    weights: PathText = Field(
        description="A folder through which the weights are transferred. This machine and the "
        "server must see it under the same path; a folder in memory is best."
    )
    tolerance: Divergence = TOLERANCE

    def folder(self, base: Path) -> Path:
        """The folder of the weights. base: the recipe's folder, where a relative path starts."""
        return (base / self.weights).absolute()


RolloutsRecipe = Annotated[
    LocalRollouts | VllmRollouts | VllmServerRollouts, Field(discriminator="kind")
]
