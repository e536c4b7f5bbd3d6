"""What is shipped: the formats of a language model, those of a classifier, and the Hub."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.section import Section


class PushRecipe(Section):
    """The exports as a repository of the Hugging Face Hub, after all of them have passed."""

    repo: str = Field(
        pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME; made if it is not there."
    )
    private: bool = Field(True, description="Of a repository that is made.")
    token_env: str = Field(
        "HF_TOKEN", description="The environment variable that holds a token with write access."
    )


ClassifierFormat = Literal["safetensors", "onnx", "onnx-int8"]


class ClassifierExportRecipe(Section):
    formats: list[ClassifierFormat] = Field(
        default=["safetensors"],
        min_length=1,
        description="safetensors, which is always made; onnx, onnx-int8: for onnxruntime "
        "(stillhouse[onnx]).",
    )
    kl_limit: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="Nats a text that an ONNX file may differ from the checkpoint; null: as the "
        "format needs.",
    )
    push_to_hub: PushRecipe | None = Field(None, description="null: nothing is uploaded.")

    @model_validator(mode="after")
    def _each_format_once(self) -> ClassifierExportRecipe:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("a format is given twice")
        return self


ExportFormat = Literal[
    "safetensors",
    "gguf-f32",
    "gguf-f16",
    "gguf-bf16",
    "gguf-q8_0",
    "gguf-q5_1",
    "gguf-q5_0",
    "gguf-q4_1",
    "gguf-q4_0",
    "gguf-mxfp4",
    "gguf-tq2_0",
    "gguf-tq1_0",
    "gguf-q2_k",
    "gguf-q3_k_m",
    "gguf-q4_k_s",
    "gguf-q4_k_m",
    "gguf-q5_k_m",
    "gguf-q6_k",
    "compressed-gptq",
    "compressed-awq",
    "compressed-fp8",
    "compressed-nvfp4",
]


class ExportRecipe(Section):
    formats: list[ExportFormat] = Field(
        default=["safetensors"],
        min_length=1,
        description="safetensors: for transformers and vLLM. gguf-*: for llama.cpp and Ollama; "
        "those ending in _k, _s or _m need llama-cpp-python. compressed-*: for vLLM, by "
        "llm-compressor.",
    )
    llm_compressor: str | None = Field(
        None,
        description="The Python of an environment that has llm-compressor, for compressed-*; a "
        "path starts from the recipe's folder, or from the working directory.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Number type of the safetensors export."
    )
    kl_limit: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="Nats a token that an export may differ from the checkpoint; null: as the "
        "format needs (docs/evaluation.md).",
    )

    importance_tokens: int | None = Field(
        16384,
        gt=0,
        description="Training tokens on which it is measured how much each input of a matrix "
        "matters (gguf-*_k*, gguf-q4_0), and that llm-compressor looks at; null: all alike.",
    )
    push_to_hub: PushRecipe | None = Field(None, description="null: nothing is uploaded.")

    @model_validator(mode="after")
    def _each_format_once(self) -> ExportRecipe:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("a format is given twice")
        return self

    @model_validator(mode="after")
    def _text_to_calibrate_on(self) -> ExportRecipe:
        found = {"compressed-gptq", "compressed-awq", "compressed-nvfp4"} & {*self.formats}
        if found and self.importance_tokens is None:
            raise ValueError(
                f"{min(found)} looks at what layers read: give importance_tokens a number, or use "
                "compressed-fp8"
            )
        return self
