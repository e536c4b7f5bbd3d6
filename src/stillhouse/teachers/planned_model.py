"""Facts about a causal language model that follow from its configuration, before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from stillhouse.errors import ModelError
from stillhouse.teachers.backbone import check_head
from stillhouse.teachers.document_rows import small_config
from stillhouse.teachers.load_model import attention_for, check_loadable, load_config
from stillhouse.teachers.model_requirements import require_layers, require_loadable, require_tokens
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import INDEX, SINGLE, read_json

_OF_CHECKPOINTS = ("_name_or_path", "dtype", "transformers_version", "use_cache")
"""Keys of a configuration that do not affect the model's shape."""


def shape_key(config: Any) -> str:
    """A key that is equal for models of equal shape, regardless of their folder and dtype."""
    shape = {name: value for name, value in config.to_dict().items() if name not in _OF_CHECKPOINTS}
    return json.dumps(shape, sort_keys=True, default=str)


def planned_model(config: Any, where: object = None, *, trusted: bool = False) -> Any:
    """Build a model on the meta device, without memory for its weights.

    where: its folder. trusted: whether code that comes with the model may run. Raises ModelError if
    no causal language model can have this configuration.
    """
    require_layers(config, where)
    with _building(config, where), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)


def model_without_weights(checkpoint: AnyModel) -> Any:
    """Build a folder's model in float32 and eval mode, with its weights on the meta device.

    Buffers have their values. Raises ModelError as `load_config` and `planned_model` do.
    """
    source = source_of(checkpoint)
    folder, config = source.path, load_config(source)
    with _building(config, folder), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention_for(config),
            trust_remote_code=source.trusted,
        )
    model.tie_weights()  # init_empty_weights has replaced each weight
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextmanager
def _building(config: Any, where: object) -> Iterator[None]:
    """Raise ModelError if the block cannot build a model with this configuration."""
    try:
        with quiet():
            yield
    # A value that an architecture does not expect can fail anywhere in its constructor.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        raise ModelError(
            f"transformers cannot build a causal language model with this config ({problem})",
            where=where or getattr(config, "name_or_path", None) or None,
            fix="check model_type, hidden_act, rope_parameters, and the sizes in its config.json, "
            "or copy the model's own config.json again",
        ) from error


def check_model_folder(checkpoint: AnyModel) -> Any:
    """Check all of a model folder that can be checked without loading weights.

    Names and shapes of weights are compared if their files are here. Returns the configuration.
    Raises ModelError.
    """
    source = source_of(checkpoint)
    path, config = source.path, load_config(source)
    require_loadable(config, path)
    if source.trusted:
        return config
    model = planned_model(config, path)
    generation = path / GENERATION_CONFIG_NAME
    if generation.is_file():
        ends = read_json(generation).get("eos_token_id")
        model.generation_config = SimpleNamespace(eos_token_id=ends)
    require_tokens(config, model, path)
    here = (path / SINGLE).exists() or (path / INDEX).exists()
    if here and getattr(config, "quantization_config", None) is None:
        check_loadable(path)
    return config


def check_planned_head(config: Any) -> Any:
    """Run `check_head` without loading the model, on a small one with a similar configuration.

    Returns the small model, which has no weights except a random head. Raises ModelError.
    """
    model = planned_model(small_config(config))
    head = model.get_output_embeddings()
    if head is not None:
        head.to_empty(device="cpu")
        for weight in head.parameters():
            nn.init.normal_(weight, std=0.02)
    check_head(model)
    return model


def learned_positions(model: Any) -> int | None:
    """The number of position embeddings of a model; None if it has no table of positions.

    GPT-2, OPT, and similar models look up each position and fail for one beyond the table.
    """
    tables = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _is_table(name):
            before = getattr(module, "offset", None)
            if before is None:
                before = 0 if module.padding_idx is None else module.padding_idx + 1
            tables.append(module.num_embeddings - before)
    for name, buffer in model.named_buffers():
        if name.endswith(("embed_positions", "pos_encoding")):  # GPT-J, CodeGen, CTRL
            tables.append(buffer.shape[0])
    if model.config.model_type == "mpt":  # a bias for each distance
        tables.append(int(model.config.max_seq_len))
    return min(tables, default=None)


def _is_table(name: str) -> bool:
    last = name.rpartition(".")[2]
    other = any(part in name for part in ("vision", "image", "encoder", "audio"))
    return not other and ("position" in last or last in ("wpe", "pos_emb", "pos_embed"))


def trained_positions(config: Any) -> int | None:
    """The longest context that a model with rotary embeddings supports; None if it sets no limit.

    This is `max_position_embeddings`, times the factor of a scaling that it does not include yet.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(scaling, dict) or not isinstance(scaling.get("factor"), int | float):
        return most
    kind, factor = scaling.get("rope_type", "default"), scaling["factor"]
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings") or most
        return max(most, int(original * factor))
    return int(most * factor) if kind in ("linear", "dynamic") else most
