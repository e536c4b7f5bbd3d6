"""How vLLM runs a model: the section that text, hidden states and rollouts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from stillhouse.field_types import AnswerTokens, Count, JsonValues, PathText, Share
from stillhouse.section import Section


class VllmEngine(Section):
    """How vLLM runs a model: on the GPUs of this machine or, with Ray, of several."""

    python: PathText | None = Field(
        None,
        description="The Python of an environment that has vLLM, 3.11 or newer; vLLM runs in a "
        "process of it. A path starts from the recipe's folder, or from the working directory. "
        "null: the Python of this run.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of the weights; auto: as the model's configuration says."
    )
    tensor_parallel: Count = Field(1, description="GPUs that share each layer.")
    pipeline_parallel: Count = Field(
        1,
        description="Groups of such GPUs, each with some of the layers; with ray, mostly one a "
        "machine.",
    )
    executor: Literal["auto", "mp", "ray"] = Field(
        "auto",
        description="ray: on a Ray cluster, which may span machines; mp: processes of this "
        "machine; auto: vLLM's choice.",
    )
    context: AnswerTokens | None = Field(
        None, description="Tokens of a prompt with its answer; null: all the model can."
    )
    gpu_memory: Share = Field(0.9, description="Share of each GPU's memory that vLLM may use.")
    batch: Count = Field(1024, description="Requests handed over at once, and committed together.")
    options: JsonValues = Field(
        default={}, description="More arguments of vllm.LLM, e.g. {quantization: fp8}."
    )

    @field_validator("options")
    @classmethod
    def _has_no_key_of_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        ours = VLLM_ARGUMENTS & set(options)
        if ours:
            raise ValueError(f"{', '.join(sorted(ours))} cannot be set here: it has its own key")
        return options

    def interpreter(self, base: Path) -> str | None:
        """`python`, as it can be run. base: the recipe's folder."""
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
