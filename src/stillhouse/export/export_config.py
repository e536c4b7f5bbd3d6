"""Recipe sections for exports: formats of a language model and a classifier, and the Hub."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from stillhouse.export.export_formats import CLASSIFIER_FORMATS, COMPRESSED, FORMATS
from stillhouse.field_types import Divergence, PathText, Tokens
from stillhouse.section import OneOf, Section


class PushRecipe(Section):
    """Upload the exports to a Hugging Face Hub repository, after all of them have passed."""

    repo: str = Field(
        pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME; created if it does not exist."
    )
    private: bool = Field(True, description="Whether a created repository is private.")
    token_env: str = Field(
        "HF_TOKEN", description="The environment variable that holds a token with write access."
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
        description="safetensors, which is always made; onnx, onnx-int8: for onnxruntime "
        "(stillhouse[onnx]).",
    )
    kl_limit: Divergence | None = Field(
        None,
        description="Nats a text that an ONNX file may differ from the checkpoint; null: as the "
        "format needs.",
    )
    push_to_hub: PushRecipe | None = Field(None, description="null: nothing is uploaded.")


class ExportRecipe(Section):
    formats: Annotated[list[Annotated[str, OneOf(FORMATS)]], AfterValidator(_each_once)] = Field(
        default=["safetensors"],
        min_length=1,
        description="safetensors: for transformers and vLLM. gguf-*: for llama.cpp and Ollama; "
        "those ending in _k, _s or _m need llama-cpp-python. compressed-*: for vLLM, by "
        "llm-compressor.",
    )
    llm_compressor: PathText | None = Field(
        None,
        description="The Python of an environment that has llm-compressor, for compressed-*; a "
        "path starts from the recipe's folder, or from the working directory.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Number type of the safetensors export."
    )
    kl_limit: Divergence | None = Field(
        None,
        description="Nats/token that an export may differ from the checkpoint; null: as the "
        "format needs (docs/evaluation.md).",
    )
    importance_tokens: Tokens | None = Field(
        16384,
        description="Training tokens on which the importance of each input of a matrix is measured "
        "(gguf-*_k*, gguf-q4_0), and on which llm-compressor calibrates; null: all alike.",
    )
    push_to_hub: PushRecipe | None = Field(None, description="null: nothing is uploaded.")

    @model_validator(mode="after")
    def _text_to_calibrate_on(self) -> ExportRecipe:
        found = {f"compressed-{name}" for name, method in COMPRESSED.items() if method.groups}
        found &= {*self.formats}
        if found and self.importance_tokens is None:
            raise ValueError(
                f"{min(found)} calibrates on text: give importance_tokens a number, or use "
                "compressed-fp8"
            )
        return self
