"""Trials with weights that are missing, superfluous, damaged, or of another type."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.input_trials import files
from bench.input_trials.models import (
    ARCHITECTURES,
    Quirk,
    judged,
    model_of,
    plain_logits,
    refused,
    rewrite,
    save,
    start,
    transformers_logits,
)  # fmt: skip
from bench.input_trials.trial import Trial


def missing_tensor(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder, *ARCHITECTURES)
    names = sorted(load_file(path / "model.safetensors"))
    name = chance.choice(names)
    rewrite(path, lambda tensors: tensors.pop(name))
    return refused(f"no {name}", path, chance)


def surplus_tensor(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder, *ARCHITECTURES)
    name = chance.choice(
        ["model.layers.9.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.lora_A.weight",
         "value_head.weight", "model.layers.0.self_attn.q_proj.weight_scale", "extra",
         "model.layers.0.self_attn.sinks"]
    )  # fmt: skip
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    return refused(f"additional {name}", path, chance, ("tensor", "weight"))


def old_buffers(chance: random.Random, folder: Path) -> Trial:
    """Buffers that older versions of transformers stored with the weights must have no effect."""
    architecture, path = start(chance, folder, "llama", "gpt2")
    expected = plain_logits(model_of(architecture))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    buffer = 1e4 ** -(torch.arange(0, 8, 2).float() / 8)
    if architecture == "gpt2":
        name, buffer = "transformer.h.0.attn.bias", torch.ones(1, 1, 256, 256).tril()
    rewrite(path, lambda tensors: tensors.update({name: buffer}))
    return judged(f"the old buffer {name}", path, expected, "may")


def wrong_shape(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder, *ARCHITECTURES)
    tensors = load_file(path / "model.safetensors")
    name = chance.choice([name for name, tensor in tensors.items() if tensor.ndim == 2])
    cut = chance.choice(
        [lambda t: t[:-1], lambda t: t[:, :-1], lambda t: torch.cat([t, t]), lambda t: t.flatten()]
    )
    rewrite(path, lambda tensors: tensors.update({name: cut(tensors[name]).contiguous()}))
    return refused(f"{name} of another shape", path, chance)


def not_finite(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder, *ARCHITECTURES)
    value = chance.choice([float("nan"), float("inf"), -float("inf")])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[chance.choice(sorted(tensors))]
        tensor.view(-1)[chance.randrange(tensor.numel())] = value

    rewrite(path, spoil)
    return refused(f"a weight that is {value}", path, chance, doors=("teacher", "student"))


def odd_types(chance: random.Random, folder: Path) -> Trial:
    """Integer or boolean tensors are not weights without their scales."""
    _, path = start(chance, folder)
    kind = chance.choice([torch.int8, torch.bool, torch.int64, torch.uint8])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("q_proj.weight"):
                tensors[name] = (tensors[name] * 10).to(kind)

    rewrite(path, spoil)
    return refused(f"weights of {kind}", path, chance)


def damaged_file(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
    file = path / "model.safetensors"
    data = file.read_bytes()
    name, data = chance.choice(
        [
            ("Git LFS pointer", files.LFS_POINTER.encode()), ("empty", b""), ("cut", data[:-100]),
            ("cut in the header", data[:60]), ("longer", data + b"\0" * 64),
            ("a huge header", b"\xff" * 8 + data[8:]), ("zeros", bytes(len(data))),
            ("HTML", b"<!DOCTYPE html><html>404</html>"),
            ("broken header", data[:8] + b"[" + data[9:]),
        ]
    )  # fmt: skip
    file.write_bytes(data)
    return refused(f"weights: {name}", path, chance)


def no_weights(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
    how = chance.choice(["none", "pickle", "dangling link", "index only", "folder"])
    (path / "model.safetensors").unlink()
    if how == "pickle":
        torch.save({"x": torch.ones(2)}, path / "pytorch_model.bin")
    elif how == "dangling link":
        (path / "model.safetensors").symlink_to(path / "absent")
    elif how == "index only":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        files.write(path, "model.safetensors.index.json", json.dumps(index))
    elif how == "folder":
        (path / "model.safetensors").mkdir()
    return refused(f"no weights: {how}", path, chance)


def shards(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
    (path / "model.safetensors").unlink()
    model_of("llama").save_pretrained(path, max_shard_size="20KB")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = chance.choice(sorted(set(content["weight_map"].values())))
    how = chance.choice(["a shard missing", "a name too many", "index broken", "index empty"])
    if how == "a shard missing":
        (path / shard).unlink()
    elif how == "a name too many":
        content["weight_map"]["model.layers.5.mlp.up_proj.weight"] = shard
        index.write_text(json.dumps(content))
    else:
        index.write_text("{" if how == "index broken" else "{}")
    return refused(how, path, chance)


def surplus_files(chance: random.Random, folder: Path) -> Trial:
    """Files next to a complete model that nothing refers to."""
    architecture, path = start(chance, folder)
    name = chance.choice(["old.safetensors", "optimizer.pt", "README.md", "pytorch_model.bin"])
    files.write(path, name, (path / "model.safetensors").read_bytes())
    return judged(f"additional {name}", path, plain_logits(model_of(architecture)))


def adapter(chance: random.Random, folder: Path) -> Trial:
    """An adapter next to the model: the folder's owner expects that it is loaded too."""
    _, path = start(chance, folder)
    config = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4, "lora_alpha": 8,
              "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip
    files.write(path, "adapter_config.json", json.dumps(config))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 32)},
              path / "adapter_model.safetensors")  # fmt: skip
    if chance.random() < 0.3:
        (path / "config.json").unlink()
    return refused("an adapter next to the model", path, chance, ("adapter",))


def prefixed(chance: random.Random, folder: Path) -> Trial:
    """Names with the prefix of a wrapper: DDP, torch.compile, PEFT."""
    _, path = start(chance, folder)
    prefix = chance.choice(["module.", "_orig_mod.", "base_model.model.", "language_model."])

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    rewrite(path, wrap)
    return refused(f"names with {prefix}", path, chance)


def two_heads(chance: random.Random, folder: Path) -> Trial:
    """The configuration ties the head to the embeddings, but the file contains a different head."""
    path = save(folder / "m", "llama", tie_word_embeddings=True)
    same = chance.random() < 0.3

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if same else 1.0)

    rewrite(path, add)
    if same:
        return judged("a tied head in the file too", path, transformers_logits(path))
    return refused("tied to the embeddings, with another head", path, chance, ("head", "tie"))


def twice_in_shards(chance: random.Random, folder: Path) -> Trial:
    """A tensor that is stored in two shards, with different values."""
    _, path = start(chance, folder, "llama")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    name, other = "model.norm.weight", "model-00002-of-00002.safetensors"
    save_file(tensors, path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({name: tensors[name] * 2}, path / other, {"format": "pt"})
    places = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {name: other}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    files.write(path, "model.safetensors.index.json", json.dumps(index))
    return refused("a tensor in two shards", path, chance)


QUIRKS: tuple[Quirk, ...] = (
    prefixed, two_heads, twice_in_shards,
    missing_tensor, surplus_tensor, old_buffers, wrong_shape, not_finite, odd_types,
    damaged_file, no_weights, shards, surplus_files, adapter,
)  # fmt: skip
