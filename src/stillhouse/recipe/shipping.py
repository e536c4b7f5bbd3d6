"""What is shipped: a classifier's formats, and the Hub."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stillhouse.recipe.section import Section


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
