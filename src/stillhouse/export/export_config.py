"""Recipe sections for exports: formats of language models and classifiers, and the Hub."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from stillhouse.export.export_formats import CLASSIFIER_FORMATS, COMPRESSED, FORMATS
from stillhouse.field_types import Divergence, PathText, Tokens
from stillhouse.section import OneOf, Section


class PushRecipe(Section):
    """Upload the exports to a Hugging Face Hub repository, once all of them have passed."""

    repo: str = Field(
        pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME; created if it does not exist."
    )
    private: bool = Field(True, description="Make the repository private if it is created.")
    token_env: str = Field(
        "HF_TOKEN", description="Name of the environment variable with a token for write access."
    )


def _each_once(formats: list[str]) -> list[str]:
    if len(set(formats)) < len(formats):
        raise ValueError("a format is given twice")
    return formats


class ClassifierExportRecipe(Section):
    formats: Annotated[
        list[Annotated[str, OneOf(CLASSIFIER_FORMATS)]], AfterValidator(_each_once)
    ] = Field(
        default=["safetensors"],
        min_length=1,
        description="safetensors: always exported; onnx and onnx-int8: for onnxruntime, need "
        "stillhouse[onnx].",
    )
    kl_limit: Divergence | None = Field(
        None,
        description="Maximum KL between the checkpoint and an ONNX file, in nats/text; null: the "
        "format's default.",
    )
    push_to_hub: PushRecipe | None = Field(
        None, description="Upload the exports to the Hugging Face Hub; null: do not upload."
    )


class ExportRecipe(Section):
    formats: Annotated[list[Annotated[str, OneOf(FORMATS)]], AfterValidator(_each_once)] = Field(
        default=["safetensors"],
        min_length=1,
        description="safetensors: for transformers and vLLM. gguf-*: for llama.cpp and Ollama; "
        "formats ending in _k, _s, or _m need llama-cpp-python. compressed-*: for vLLM, quantized "
        "by llm-compressor.",
    )
    llm_compressor: PathText | None = Field(
        None,
        description="For compressed-*: Python interpreter of an environment with llm-compressor. A "
        "relative path starts from the recipe's folder or the working directory.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Dtype of the safetensors export."
    )
    kl_limit: Divergence | None = Field(
        None,
        description="Maximum KL between the checkpoint and an export, in nats/token; null: the "
        "format's default (docs/evaluation.md).",
    )
    importance_tokens: Tokens | None = Field(
        16384,
        description="Training tokens to measure the importance of matrix inputs on (gguf-*_k*, "
        "gguf-q4_0), and for llm-compressor to calibrate on; null: all inputs count equally.",
    )
    push_to_hub: PushRecipe | None = Field(
        None, description="Upload the exports to the Hugging Face Hub; null: do not upload."
    )

    @model_validator(mode="after")
    def _text_to_calibrate_on(self) -> ExportRecipe:
        found = {f"compressed-{name}" for name, method in COMPRESSED.items() if method.groups}
        found &= {*self.formats}
        if found and self.importance_tokens is None:
            raise ValueError(
                f"{min(found)} calibrates on text: set importance_tokens to a number, or use "
                "compressed-fp8"
            )
        return self
