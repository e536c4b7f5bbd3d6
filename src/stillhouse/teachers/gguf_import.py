"""Converts a GGUF file once into a plain Hugging Face folder, in float32.

Block-quantized weights are d·q + m with 16-bit d and m. Such a product needs up to 11 + 8 bits of
mantissa, which fit in float32; bfloat16 (8 bits) would round it a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from gguf import GGUFReader
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stillhouse.checksums import SUMS, damaged_export, read_sums, write_sums
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import ModelError
from stillhouse.file_locks import building_folder
from stillhouse.progress import note
from stillhouse.teachers.gguf_keys import UnreadableGGUFError, read_config
from stillhouse.teachers.gguf_tensors import read_tensors
from stillhouse.teachers.gguf_words import read_tokenizer
from stillhouse.teachers.hashing import changed_files, file_sha256
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import weight_files
from stillhouse.teachers.write_by_layer import write_shards

_CACHE = "set STILLHOUSE_CACHE to a folder on a disk with space"
CONVERTER_VERSION = 3
"""Part of the cache key: increase it whenever the conversion's output changes."""


@dataclass(frozen=True)
class ConvertedModel:
    path: Path
    fingerprint: str


def convert_gguf(path: Path, cache: Path) -> ConvertedModel:
    """Convert a GGUF file to a folder with weights, config, tokenizer, and chat template.

    The folder is created under a temporary name and then renamed, so a folder with the final name
    is complete, and two processes that convert at once end up with the same folder.
    Raises ModelError: not a GGUF file, truncated, damaged, or an unsupported architecture.
    """
    _check_magic(path)
    if changed_files(path.parent, [path.name], cache):
        raise damaged_export(path.parent, f"{path.name} does not match {SUMS}")
    fingerprint = f"gguf-{file_sha256(path, cache)}-{CONVERTER_VERSION}"
    final = cache / "models" / fingerprint
    if final.is_dir():
        damaged = _damaged(final, cache)
        if damaged is None:
            return ConvertedModel(final, fingerprint)
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
            _rename(building, final)
    except OSError as error:
        raise ModelError(
            f"the file cannot be converted ({error})", where=path, fix="download the file again"
        ) from error
    return ConvertedModel(final, fingerprint)


def _damaged(folder: Path, cache: Path) -> str | None:
    """The first file of a converted model that has changed or is missing; None if there is none."""
    try:
        names = [*read_sums(folder)]
    except (OSError, ValueError):
        return SUMS
    missing = [name for name in names if not (folder / name).is_file()]
    return next(iter(missing or changed_files(folder, names, cache)), None)


def _rename(building: Path, final: Path) -> None:
    """Rename the folder, unless another process has finished the same one first."""
    try:
        building.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"this is not a GGUF file: it starts with {magic!r}",
            where=path,
            fix="download or copy it again",
        )


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
    except UnreadableGGUFError as error:
        raise _unreadable(path, str(error)) from error
    # Metadata can have any number for a size and text for a number, and transformers and tokenizers
    # raise anything up to plain Exception for input that they cannot read.
    except Exception as error:
        raise _unreadable(path, f"{what} ({error})") from error


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


def _unreadable(path: Path, what: str) -> ModelError:
    return ModelError(
        f"Stillhouse cannot convert this GGUF file: {what}",
        where=path,
        fix="use the original model's Hugging Face folder or Hub id",
    )


def _write_license(reader: GGUFReader, folder: Path) -> None:
    """Write the license into a model card's metadata, as models on the Hub do."""
    fields = reader.fields
    names = {"license": "general.license"}
    names |= {f"license_{part}": f"general.license.{part}" for part in ("name", "link")}
    head = {name: fields[key].contents() for name, key in names.items() if key in fields}
    if head:
        card = f"---\n{yaml.safe_dump(head)}---\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
