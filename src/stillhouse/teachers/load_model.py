"""Loads a model or a tokenizer from a folder, and says clearly when the folder does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stillhouse.errors import ModelError
from stillhouse.teachers.backbone import check_head
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import weight_files

_checked: set[tuple[Path, int]] = set()
"""Model folders whose head was compared with the model's logits, and the time of their config."""


def load_model(path: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A causal language model in eval mode, every weight from the folder, on the CPU.

    Attention is PyTorch's scaled_dot_product_attention, except where the model caps attention
    scores, which that function cannot do.
    Raises ModelError: damaged files, weights that are missing, left over or of another shape, an
    architecture that is not known or whose logits Stillhouse cannot compute, too little memory.
    """
    files = weight_files(path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=attention_for(config),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _no_memory(path, files, dtype) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise _no_memory(path, files, dtype) from error
        raise ModelError(
            f"this model cannot be loaded ({error})", where=path, fix="check its config.json"
        ) from error
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise ModelError(
            f"transformers cannot load this model ({error})",
            where=path,
            fix="check that it is a causal language model of a known architecture; code that "
            "comes with a model runs only with trust_remote_code: true",
        ) from error
    _check_loaded(info, path)
    model.requires_grad_(False).eval()
    check_head_once(model, path)
    return model


def check_head_once(model: Any, path: Path) -> None:
    """Does `check_head` for the model in a folder, once in a process."""
    known = path.resolve(), (path / "config.json").stat().st_mtime_ns
    if known not in _checked:
        check_head(model)
        _checked.add(known)


def check_loadable(
    path: Path, kind: Any = AutoModelForCausalLM, *, trust_remote_code: bool = False
) -> None:
    """Compares names and shapes of a folder's weights with its configuration, without memory.

    kind: the class of transformers that is to load it. Raises ModelError: no or damaged files,
    weights that are missing, left over or of another shape.
    """
    weight_files(path)
    try:
        with quiet():
            _, info = kind.from_pretrained(
                path,
                device_map="meta",
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"this model cannot be loaded ({error})", where=path, fix="check its config.json"
        ) from error
    _check_loaded(info, path)


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration; ModelError when it cannot be read or is of no known kind."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except (StrictDataclassError, ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(
            f"transformers cannot read this model's config.json ({error})",
            where=path / "config.json",
            fix="check model_type; code that comes with a model runs only with "
            "trust_remote_code: true",
        ) from error


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; ModelError when there is none."""
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
    # The tokenizers library raises plain Exception for a damaged tokenizer.json.
    except Exception as error:
        raise ModelError(
            f"there is no tokenizer that can be loaded ({error})",
            where=path,
            fix="copy tokenizer.json and tokenizer_config.json into the folder",
        ) from error


def attention_for(config: Any) -> str:
    """`eager` for models that cap attention scores (Gemma 2): sdpa would silently not do it."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if capped is None else "eager"


def _check_loaded(info: dict[str, Any], path: Path) -> None:
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    problems = (
        ("of another shape than the config says", mismatched),
        ("missing", sorted(info["missing_keys"])),
        ("not part of the model", sorted(info["unexpected_keys"])),
    )
    for problem, names in problems:
        if names:
            raise ModelError(
                f"{len(names)} weights are {problem}: {', '.join(names[:3])}",
                where=path,
                fix="config.json and the weights are of two models: copy the model again",
            )


def _no_memory(path: Path, files: list[Path], dtype: torch.dtype) -> ModelError:
    stored = sum(file.stat().st_size for file in files)
    return ModelError(
        f"too little memory to load {stored / 1e9:.1f} GB of weights as {dtype}",
        where=path,
        fix="use a smaller teacher or a machine with more memory",
    )
