"""Converts a GGUF file once into a plain Hugging Face folder, in float32.

Block-quantized weights are d·q + m with 16-bit d and m. Such a product needs up to 11 + 8 bits of
mantissa, which fit in float32; bfloat16 (8 bits) would round it a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stillhouse.checksums import SUMS, damaged_export, read_sums, write_sums
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import ModelError
from stillhouse.file_locks import building_folder
from stillhouse.progress import note
from stillhouse.teachers.gguf_families import ARCHITECTURES, DIVISORS, LLAMA, from_file
from stillhouse.teachers.gguf_keys import UnreadableGGUFError, read_config
from stillhouse.teachers.gguf_words import read_tokenizer
from stillhouse.teachers.hashing import changed_files, file_sha256
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import weight_files
from stillhouse.teachers.write_by_layer import write_shards

_CACHE = "set STILLHOUSE_CACHE to a folder on a disk with space"
CONVERTER_VERSION = 3
"""Part of the cache key: increase it whenever the conversion's output changes."""
_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def convert_gguf(path: Path, cache: Path) -> Path:
    """Convert a GGUF file to a folder with weights, config, tokenizer, and chat template.

    The folder's name is the fingerprint of its content.
    The folder is created under a temporary name and then renamed, so a folder with the final name
    is complete, and two processes that convert at once end up with the same folder.
    Raises ModelError: not a GGUF file, truncated, damaged, or an unsupported architecture.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"this is not a GGUF file: it starts with {magic!r}",
            where=path,
            fix="download or copy it again",
        )
    if changed_files(path.parent, [path.name], cache):
        raise damaged_export(path.parent, f"{path.name} does not match {SUMS}")
    final = cache / "models" / f"gguf-{file_sha256(path, cache)}-{CONVERTER_VERSION}"
    if final.is_dir():
        damaged = _damaged(final, cache)
        if damaged is None:
            return final
        note(f"{final} is damaged ({damaged})")
        with building_folder(final) as discarded:  # a kill must not leave part of it in place
            final.rename(discarded)
    reader = _read(path)
    note(f"Converting {path.name} to safetensors, once, in {final}")
    try:
        with (
            disk_errors(final.parent, fix=f"free some space there, or {_CACHE}", elsewhere=_CACHE),
            building_folder(final) as building,
        ):
            _convert(path, reader, building)
            weight_files(building)
            write_sums(building)
            try:
                building.rename(final)
            except OSError:
                if not final.is_dir():  # unless another process has finished it first
                    raise
    except OSError as error:
        raise ModelError(
            f"the file cannot be converted ({error})", where=path, fix="download the file again"
        ) from error
    return final


def _damaged(folder: Path, cache: Path) -> str | None:
    """The first file of a converted model that has changed or is missing; None if there is none."""
    try:
        names = [*read_sums(folder)]
    except (OSError, ValueError):
        return SUMS
    missing = [name for name in names if not (folder / name).is_file()]
    return next(iter(missing or changed_files(folder, names, cache)), None)


def _read(path: Path) -> GGUFReader:
    """Open the file, and check that it contains every tensor completely."""
    damaged: Exception | None = None
    try:
        reader = GGUFReader(path)
        size = path.stat().st_size
        if all(t.data_offset + t.n_bytes <= size for t in reader.tensors):
            return reader
    # The reader has no error type of its own: a truncated or foreign file can raise any of these.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        damaged = error
    raise ModelError(
        "this GGUF file is damaged or truncated", where=path, fix="download or copy it again"
    ) from damaged


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Raise ModelError where the block cannot read this part of the file."""
    try:
        with quiet():
            yield
    except (OSError, MemoryError):
        raise
    # Metadata can have any number for a size and text for a number, and transformers and tokenizers
    # raise anything up to plain Exception for input that they cannot read.
    except Exception as error:
        problem = str(error) if isinstance(error, UnreadableGGUFError) else f"{what} ({error})"
        raise ModelError(
            f"Stillhouse cannot convert this GGUF file: {problem}",
            where=path,
            fix="use the original model's Hugging Face folder or Hub id",
        ) from error


def _convert(path: Path, reader: GGUFReader, folder: Path) -> None:
    with _readable(path, "its metadata"):
        config = read_config(reader)
    with _readable(path, "its tokenizer"):
        tokenizer = read_tokenizer(path, reader)
    for role in ("bos", "eos", "pad"):
        setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    config.dtype = torch.float32
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.name_or_path = path.stem
    with quiet():
        config.save_pretrained(folder)
        generation = GenerationConfig.from_model_config(config)
        generation.eos_token_id = _ends(reader) or generation.eos_token_id
        generation.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    with _readable(path, "its tensors"):
        write_shards(read_tensors(reader, config), folder)
    _write_license(reader, folder)


def _ends(reader: GGUFReader) -> list[int]:
    """The tokens at which llama.cpp stops: end of text, end of turn, and end of message."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    found = (reader.fields[key].contents() for key in keys if key in reader.fields)
    return list(dict.fromkeys(map(int, found)))


def _write_license(reader: GGUFReader, folder: Path) -> None:
    """Write the license into a model card's metadata, as models on the Hub do."""
    fields = reader.fields
    names = {"license": "general.license"}
    names |= {f"license_{part}": f"general.license.{part}" for part in ("name", "link")}
    head = {name: fields[key].contents() for name, key in names.items() if key in fields}
    if head:
        card = f"---\n{yaml.safe_dump(head)}---\n"
        (folder / "README.md").write_text(card, encoding="utf-8")


# --- tensors under the names of a transformers checkpoint ----------------------------------------


def read_tensors(reader: GGUFReader, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the model in float32, with its name in a checkpoint.

    Raises UnreadableGGUFError: a tensor that the model does not have, or one that is missing, has
    the wrong shape, or contains values that are not finite.
    """
    there = ARCHITECTURES[config.model_type]
    if reader.fields["general.architecture"].contents() == LLAMA.name:
        there = LLAMA
    known = gguf.get_tensor_name_map(there.arch, config.num_hidden_layers)
    left = {tensor.name: tensor for tensor in reader.tensors}
    shapes = _shapes(config)
    found = {
        name: left.pop(known.get_name(name, try_suffixes=(".weight", ".bias")), None)
        for name in shapes
    }
    surplus = sorted(left.keys() - set(DIVISORS))  # divisors are in the configuration
    if surplus:
        raise UnreadableGGUFError(f"it has tensors that are not part of the model: {_few(surplus)}")
    missing = [name for name, stored in found.items() if stored is None]
    if missing:
        raise UnreadableGGUFError(
            f"{len(missing)} of {len(shapes)} tensors are missing: {_few(missing)}"
        )
    for name, stored in found.items():
        data = from_file(there, name, _numbers(stored), config)
        if list(data.shape) != shapes[name]:
            raise UnreadableGGUFError(
                f"the tensor {stored.name} has shape {list(data.shape)}, not {shapes[name]}"
            )
        if not np.isfinite(data).all():
            raise UnreadableGGUFError(f"the tensor {stored.name} contains NaN or infinity")
        yield from _apart(name, torch.from_numpy(np.array(data, dtype=np.float32))).items()


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shapes(config: Any) -> dict[str, list[int]]:
    """Shapes of the checkpoint's tensors, but with a layer's experts stacked, as in the file."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        experts = _EXPERTS.fullmatch(name)
        if experts is None:
            found[name] = list(tensor.shape)
            continue
        parts = ["gate_proj", "up_proj"] if experts[2] == "gate_up_proj" else ["down_proj"]
        number, rows, columns = tensor.shape
        for part in parts:
            found[f"{experts[1]}.{part}.weight"] = [number, rows // len(parts), columns]
    return found


def _numbers(stored: Any) -> Any:
    try:
        return gguf.dequantize(stored.data, stored.tensor_type)
    except NotImplementedError as error:
        kind = gguf.GGMLQuantizationType(stored.tensor_type).name
        raise UnreadableGGUFError(
            f"the tensor {stored.name} has the unsupported type {kind}"
        ) from error


def _apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split stacked experts into one tensor each, as in checkpoints."""
    prefix, _, part = name.rpartition(".experts.")
    if not prefix:
        return {name: tensor}
    return {f"{prefix}.experts.{n}.{part}": each.clone() for n, each in enumerate(tensor)}
