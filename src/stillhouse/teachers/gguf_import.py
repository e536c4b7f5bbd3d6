"""Converts a GGUF file once into a plain Hugging Face folder, in float32.

Float32, because block-quantized weights are d·q + m with 16-bit d and m: such a product needs up
to 11 + 8 bits of mantissa, which float32 holds and bfloat16 (8 bits) would round a second time.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from stillhouse.errors import ModelError
from stillhouse.progress import note
from stillhouse.teachers.hashing import file_sha256
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.weights import weight_files

CONVERTER_VERSION = 2
"""Part of the cache's key: raise it when the conversion writes something else."""


@dataclass(frozen=True)
class ConvertedModel:
    path: Path
    fingerprint: str


def convert_gguf(path: Path, cache: Path) -> ConvertedModel:
    """The safetensors folder of a GGUF file: weights, config, tokenizer and its chat template.

    Made under a temporary name and renamed, so that a folder with its final name is whole, and
    two processes that convert at once both end with the same folder.
    Raises ModelError: not a GGUF file, cut short, or an architecture that is not supported.
    """
    _check_magic(path)
    fingerprint = f"gguf-{file_sha256(path, cache)}-{CONVERTER_VERSION}"
    final = cache / "models" / fingerprint
    if final.is_dir():
        return ConvertedModel(final, fingerprint)
    _check_tensors(path)
    note(f"Converting {path.name} to safetensors, once, in {final}")
    building = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        _convert(path, building)
        weight_files(building)
        if not _rename(building, final):
            shutil.rmtree(building)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise ModelError(
            f"the converted model cannot be written ({error})",
            where=final.parent,
            fix="free some disk space, or set STILLHOUSE_CACHE to a folder that can be written",
        ) from error
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return ConvertedModel(final, fingerprint)


def _rename(building: Path, final: Path) -> bool:
    """False when another process has finished the same folder first."""
    try:
        building.rename(final)
    except OSError:
        if final.is_dir():
            return False
        raise
    return True


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"this is not a GGUF file: it starts with {magic!r}",
            where=path,
            fix="download or copy it again",
        )


def _check_tensors(path: Path) -> None:
    """Every tensor lies inside the file."""
    damaged: Exception | None = None
    complete = False
    try:
        reader = GGUFReader(path)
        size = path.stat().st_size
        complete = all(t.data_offset + t.n_bytes <= size for t in reader.tensors)
    # The reader has no error of its own: a cut or foreign file shows as any of these.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        damaged = error
    if damaged is not None or not complete:
        raise ModelError(
            "this GGUF file is damaged or cut short",
            where=path,
            fix="download or copy it again",
        ) from damaged


def _convert(path: Path, folder: Path) -> None:
    try:
        with quiet(), _no_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except OSError:
        raise
    # transformers and tokenizers raise anything, up to plain Exception, on what they cannot read.
    except Exception as error:
        raise ModelError(
            f"transformers cannot read this GGUF file ({error})",
            where=path,
            fix="use the original model's Hugging Face folder or Hub id",
        ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelError(
            f"this GGUF file lacks {len(names)} tensors of the model, such as {names[0]}",
            where=path,
            fix="use the original model's Hugging Face folder or Hub id",
        )
    _forget_gguf(model, path)
    with quiet():
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    _write_license(path, folder)


def _write_license(path: Path, folder: Path) -> None:
    """As the head of a model card, where the Hub's models say it too."""
    fields = GGUFReader(path).fields
    names = {"license": "general.license"}
    names |= {f"license_{part}": f"general.license.{part}" for part in ("name", "link")}
    head = {name: fields[key].contents() for name, key in names.items() if key in fields}
    if head:
        card = f"---\n{yaml.safe_dump(head)}---\n"
        (folder / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers' GGUF reader draws a bar of its own, which no setting of its turns off."""
    original = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = _without_bar
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = original


def _without_bar(items: Iterable[Any], **_: object) -> Iterable[Any]:
    return items


def _forget_gguf(model: Any, path: Path) -> None:
    """The weights are plain floats now; what says otherwise would forbid saving them."""
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config.name_or_path = path.stem
