"""Loading of models and tokenizers from folders, with clear errors if something does not match."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.distributed import DistributedConfig

from stillhouse.errors import LostProcessError, ModelError
from stillhouse.launch import world_size
from stillhouse.processes import local_part, lost_process
from stillhouse.teachers.backbone import check_head
from stillhouse.teachers.model_requirements import (
    require_known_keys,
    require_loadable,
    require_tokens,
    require_windows,
)
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.quantized_model import dequantize, float_values, set_buffers
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.stored_tokenizer import as_stored, require_stored_tokens
from stillhouse.teachers.weights import (
    WHOLE_NUMBERS,
    read_json,
    read_tensors,
    stored_types,
    weight_files,
)

_checked: set[tuple[Path, int]] = set()
"""Model folders whose head has been checked, each with its config's modification time."""
_CHECKED: dict[str, Any] = {
    "local_files_only": True,
    "use_safetensors": True,
    "ignore_mismatched_sizes": True,
    "output_loading_info": True,
}
"""Options with which `from_pretrained` reports mismatches, for `_check_loaded`, and goes on."""


def load_model(
    model: AnyModel,
    *,
    dtype: torch.dtype,
    distributed: DistributedConfig | None = None,
    finite: bool = True,
) -> Any:
    """Load a causal language model on the CPU in eval mode, with every weight from the folder.

    Attention is PyTorch's scaled_dot_product_attention, unless the model caps attention
    scores, which that function cannot do, or its architecture does not support it.
    distributed: how to shard the model over the processes of a torchrun; each reads its own shard,
    to its own device.
    finite: check that all values are finite, which reads every page of the files into memory.
    Raises ModelError: damaged files; weights that are missing, unexpected, of the wrong shape, or
    not finite; an architecture that is unknown, not a decoder, or whose logits Stillhouse cannot
    compute; a quantization that cannot be loaded; or too little memory. LostProcessError: another
    process failed.
    """
    source = source_of(model)
    path = source.path
    files = weight_files(path)
    config = load_config(source)
    require_loadable(config, path)
    processes = 1 if distributed is None else world_size()
    try:
        with quiet(), lost_process(processes):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=attention_for(config),
                trust_remote_code=source.trusted,
                **_CHECKED,
                **({} if distributed is None else {"distributed_config": distributed}),
            )
    except LostProcessError:
        raise
    # A value that an architecture does not expect can fail anywhere in its constructor.
    except Exception as error:
        torch_failed = isinstance(error, RuntimeError)
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if full or (torch_failed and "allocate memory" in str(error)):
            stored = sum(file.stat().st_size for file in files)
            what = f"too little memory to load {stored / 1e9:.1f} GB of weights as {dtype}"
            fix = "use a smaller teacher or a machine with more memory"
        elif torch_failed:
            what, fix = f"this model cannot be loaded ({error})", "check its config.json"
        else:
            what = f"transformers cannot load this model ({type(error).__name__}: {error})"
            fix = (
                "check that it is a causal language model of a known architecture; code that "
                "comes with a model runs only with trust_remote_code: true"
            )
        raise ModelError(what, where=path, fix=fix) from error
    _check_loaded(info, loaded, files, path)
    if getattr(loaded.config, "quantization_config", None) is not None:
        set_buffers(loaded)
        dequantize(loaded, dtype)
    require_tokens(config, loaded, path)
    if finite:
        check_finite(loaded, path)
        _check_written(loaded, path)
    loaded.requires_grad_(False).eval()
    if distributed is None:
        check_head_once(loaded, path)
    return loaded


def check_head_once(model: Any, path: Path) -> None:
    """Run `check_head` for the model in a folder, once per process."""
    known = path.resolve(), (path / "config.json").stat().st_mtime_ns
    if known not in _checked:
        check_head(model)
        _checked.add(known)


def check_loadable(model: AnyModel, kind: Any = AutoModelForCausalLM) -> None:
    """Compare names and shapes of a folder's weights with its configuration, without loading them.

    kind: the transformers class that will load it. Raises ModelError: files that are missing or
    damaged, or weights that are missing, unexpected, or of the wrong shape.
    """
    source = source_of(model)
    path, trusted = source.path, source.trusted
    files = weight_files(path)
    try:
        with quiet():
            loaded, info = kind.from_pretrained(
                path, device_map="meta", trust_remote_code=trusted, **_CHECKED
            )
    # As in `load_model`, an unexpected value can fail anywhere.
    except Exception as error:
        raise ModelError(
            f"this model cannot be loaded ({error})",
            where=path,
            fix="check its config.json and generation_config.json",
        ) from error
    _check_loaded(info, loaded, files, path)


def load_config(model: AnyModel) -> Any:
    """Load the model's configuration. Raises ModelError if it cannot be read or its type is
    unknown."""
    source = source_of(model)
    content = None
    with suppress(OSError):  # transformers says what is wrong
        content = (source.path / "config.json").read_bytes()
    return copy.deepcopy(_config(source.path, content, source.trusted))


@lru_cache(maxsize=64)
def _config(path: Path, content: bytes | None, trusted: bool) -> Any:
    """The configuration of a folder whose config.json has this content. Cached, since a run loads
    each many times."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=trusted, local_files_only=True
            )
            text = config.get_text_config()  # audio models have several
            if not isinstance(text, PreTrainedConfig):
                raise TypeError("its text_config is not an object")
    # A configuration class can raise any error for values that it does not expect.
    except Exception as error:
        raise ModelError(
            f"transformers cannot read this model's config.json ({error})",
            where=path / "config.json",
            fix="check model_type; code that comes with a model runs only with "
            "trust_remote_code: true",
        ) from error
    require_known_keys(config, read_json(path / "config.json"), path / "config.json")
    require_windows(config, path / "config.json")
    for part in (config, config.get_text_config()):
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    return config


def load_tokenizer(model: AnyModel) -> Any:
    """Load the folder's tokenizer, with the tokens of tokenizer.json if there is one.

    Raises ModelError if the folder has no tokenizer. transformers would create one that has only
    the architecture's special tokens.
    """
    source = source_of(model)
    path = source.path
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=source.trusted, local_files_only=True
            )
            tokenizer = as_stored(tokenizer, path)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("it has only special tokens")
    # The tokenizers library raises plain Exception for a damaged tokenizer.json.
    except Exception as error:
        raise ModelError(
            f"no tokenizer can be loaded ({error})",
            where=path,
            fix="copy all of the tokenizer's files into the folder: tokenizer.json, "
            "tokenizer_config.json, and chat_template.jinja if there is one",
        ) from error
    require_stored_tokens(tokenizer, path)
    return tokenizer


def attention_for(config: Any) -> str | None:
    """`eager` for models that cap attention scores (Gemma 2), which sdpa silently would not do.

    None for all others: sdpa if the architecture supports it, otherwise eager (GPT-OSS, BLOOM).
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return None if capped is None else "eager"


def _check_loaded(info: dict[str, Any], model: Any, files: list[Path], path: Path) -> None:
    """Raise ModelError if the files do not contain the model's weights. info: of
    `from_pretrained`."""
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    prefix = _wrapper(info["missing_keys"], info["unexpected_keys"])
    if prefix:
        raise ModelError(
            f"the weights' names begin with {prefix}, as if the model was saved inside a wrapper",
            where=path,
            fix="save the model itself: unwrap it (accelerate's unwrap_model, peft's "
            "merge_and_unload), then call save_pretrained",
        )
    problems = (
        ("of a different shape than in config.json", mismatched),
        ("missing", sorted(info["missing_keys"])),
        ("not part of the model", sorted(info["unexpected_keys"])),
    )
    for problem, names in problems:
        if names:
            raise ModelError(
                f"{len(names)} weights are {problem}: {', '.join(names[:3])}",
                where=path,
                fix="copy the model again: config.json and the weights belong to different models",
            )
    _check_types(model, files, path)
    _check_tied(model, files, path)


def _wrapper(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """The prefix with which all missing names, except a tied head's, are among the unexpected ones;
    empty if there is none."""
    lacking, names = sorted(missing), set(unexpected)
    last = f".{lacking[-1]}" if lacking else None
    found = {name.removesuffix(last[1:]) for name in names if last and name.endswith(last)}
    most = len(lacking) - 1
    return next((one for one in found if sum(one + name in names for name in lacking) >= most), "")


def _check_types(model: Any, files: list[Path], path: Path) -> None:
    """Raise ModelError if weights are stored as integers without scales."""
    if getattr(model.config, "quantization_config", None) is not None:
        return
    parameters = {name for name, _ in model.named_parameters()}
    stored = stored_types(files)
    integers = [name for name in stored if name in parameters and stored[name] in WHOLE_NUMBERS]
    if integers:
        raise ModelError(
            f"{len(integers)} weights are stored as {stored[integers[0]]} without scales, "
            f"such as {integers[0]}",
            where=path,
            fix="use the unquantized model, or copy the config.json that has its "
            "quantization_config too",
        )


def check_finite(model: Any, path: Path) -> None:
    """Raise ModelError if a weight of a model or layer has NaN or infinity. path: its folder."""
    for name, weight in model.named_parameters():
        if weight.is_meta or not local_part(weight).numel() or not weight.is_floating_point():
            continue
        values = float_values(local_part(weight.detach()))
        low, high = map(float, values.aminmax())  # NaN if any value is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ModelError(
                f"the weight {name} contains values that are not finite (NaN or infinity)",
                where=path,
                fix="copy the model again, or use a checkpoint from before its training diverged",
            )


def _check_written(model: Any, path: Path) -> None:
    """Raise ModelError if the embeddings are all equal: nothing was written into them."""
    weight = model.get_input_embeddings().weight
    if weight.is_meta or local_part(weight).numel() < 2 or not weight.is_floating_point():
        return
    low, high = float_values(local_part(weight.detach())).aminmax()
    if low == high:
        raise ModelError(
            f"all values of the embeddings are {float(low):g}: the model was saved without its "
            "weights",
            where=path,
            fix="copy the model again; after sharded training (ZeRO-3, FSDP), gather the weights "
            "before saving them",
        )


def _check_tied(model: Any, files: list[Path], path: Path) -> None:
    """Raise ModelError if the configuration ties a head that differs from the embeddings."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    names = {f"{name}.weight" for name, module in model.named_modules() if module in ends}
    stored = read_tensors(files, names)
    if len(stored) < 2 or torch.equal(*stored.values()):
        return
    raise ModelError(
        "config.json ties the head to the embeddings, but the weights contain a different head; "
        "programs disagree on which of the two they use",
        where=path,
        fix="set tie_word_embeddings to false in config.json to use that head, or remove "
        "lm_head.weight from the weights to use the embeddings",
    )
