"""A model whose weights are on the meta device, and whose buffers have their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from stillhouse.errors import ModelError
from stillhouse.teachers.load_model import attention_for, load_config
from stillhouse.teachers.quiet import quiet


def model_without_weights(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder in float32 and in eval mode, but for the values of its weights.

    Raises ModelError as `load_config`, and if no causal language model has this configuration.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    try:
        with init_empty_weights(include_buffers=False), quiet():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attention_for(config),
                trust_remote_code=trust_remote_code,
            )
    # A value that an architecture does not expect fails anywhere in its constructor.
    except Exception as error:
        raise ModelError(
            f"transformers cannot build this model ({type(error).__name__}: {error})",
            where=folder,
            fix="check that it is a causal language model of a known architecture",
        ) from error
    model.tie_weights()  # each weight has become a new one
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
