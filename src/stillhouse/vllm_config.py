"""The recipe section that configures vLLM, for generated text, hidden states, and rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from stillhouse.field_types import AnswerTokens, Count, JsonValues, PathText, Share
from stillhouse.section import Section


class VllmEngine(Section):
    """How vLLM runs a model, on this machine's GPUs or, with Ray, on several machines' GPUs."""

    python: PathText | None = Field(
        None,
        description="The Python interpreter, 3.11 or newer, of an environment with vLLM, which "
        "runs in a separate process. A path is relative to the recipe's folder or the working "
        "directory. null means this run's Python.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="The weights' dtype; auto follows the model's configuration."
    )
    tensor_parallel: Count = Field(1, description="GPUs that share each layer.")
    pipeline_parallel: Count = Field(
        1,
        description="Groups of such GPUs, each with some of the layers; with ray, usually one per "
        "machine.",
    )
    executor: Literal["auto", "mp", "ray"] = Field(
        "auto",
        description="ray uses a Ray cluster, which can span machines; mp uses processes on this "
        "machine; auto leaves the choice to vLLM.",
    )
    context: AnswerTokens | None = Field(
        None,
        description="Maximum tokens in a prompt and its answer; null means the model's maximum.",
    )
    gpu_memory: Share = Field(0.9, description="Fraction of each GPU's memory for vLLM to use.")
    batch: Count = Field(
        1024,
        description="Requests to submit at once and commit together; signals.vllm does not use it.",
    )
    options: JsonValues = Field(
        default={}, description="More arguments for vllm.LLM, such as {quantization: fp8}."
    )

    @field_validator("options")
    @classmethod
    def _has_no_key_of_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        ours = VLLM_ARGUMENTS & set(options)
        if ours:
            names = ", ".join(sorted(ours))
            raise ValueError(f"{names} cannot be set in options: use the section's other keys")
        return options

    def interpreter(self, base: Path) -> str | None:
        """Return `python` as a command to run. base: the recipe's folder."""
        if self.python is None:
            return None
        beside = base / self.python
        return str(beside.absolute()) if beside.exists() else self.python

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


VLLM_ARGUMENTS = frozenset((
    "model", "tokenizer", "trust_remote_code", "dtype", "seed", "tensor_parallel_size",
    "pipeline_parallel_size", "distributed_executor_backend", "max_model_len",
    "gpu_memory_utilization",
))  # fmt: skip
"""Arguments of vllm.LLM that Stillhouse sets itself."""
