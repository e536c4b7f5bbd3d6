"""Model folders: sound ones of many architectures, and odd or damaged ones.

A sound folder must give the logits that plain transformers computes for it. What is damaged must be
refused, or give the logits of the model before the damage.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import stillhouse as sh
from bench.input_trials import files
from bench.input_trials.chat_formats import FORMATS, tokenizer
from bench.input_trials.trial import Refusal, Trial
from stillhouse.check import check_recipe
from stillhouse.errors import ModelError
from stillhouse.signals.lm_head import head_logits

WORDS = tokenizer(FORMATS[0])
VOCABULARY = len(WORDS) + 8
"""Some rows are padding: transformers adds a token to the tokenizers of some architectures."""
LENGTH = 24
TOLERANCE = 1e-3
"""Of the largest logit: float32 against float32 in another order of sums."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "mistral": {**_SIZES, "sliding_window": 8},
    "qwen2": _SIZES,
    "qwen3": {**_SIZES, "head_dim": 8},
    "gemma2": {**_SIZES, **_GEMMA, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_SIZES, **_GEMMA},
    "gpt2": _GPT2,
    "granite": {**_SIZES, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere": {**_SIZES, "logit_scale": 0.5},
    "olmo2": _SIZES,
    "phi3": _SIZES,
    "smollm3": _SIZES,
    "gpt_neox": {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"},
    "qwen3_moe": {**_SIZES, "head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4,
                  "num_experts_per_tok": 2},
}  # fmt: skip
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
"""Architectures whose configurations look alike."""
Quirk = Callable[[random.Random, Path], Trial]


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    if number % 3 == 0:
        return sound(chance, folder, number // 3)
    return QUIRKS[(number * 2 // 3) % len(QUIRKS)](chance, folder)


# --- models ----------------------------------------------------------------------------------


@cache
def model_of(architecture: str, changes: str = "{}") -> Any:
    """A random model, the same one each time. changes: of the configuration, as JSON."""
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **json.loads(changes)})
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def save(folder: Path, architecture: str, **changes: Any) -> Path:
    """The folder of a model and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model_of(architecture, json.dumps(changes)).save_pretrained(folder)
    WORDS.save_pretrained(folder)
    return folder


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_logits(model: Any) -> torch.Tensor:
    return model(input_ids=_ids(), use_cache=False).logits[0].float()


def transformers_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return plain_logits(model.eval())


# --- three doors -----------------------------------------------------------------------------


@torch.no_grad()
def as_teacher(folder: Path) -> torch.Tensor:
    """Logits [L - 1, V] as a training gets them."""
    teacher = sh.Teacher.load(folder, dtype="float32", device="cpu")
    ids = _ids()
    positions = torch.arange(LENGTH)[None]
    view = teacher.answer({"input_ids": ids, "labels": ids, "position_ids": positions})
    signal: Any = view.signals[0]
    return head_logits(signal.head, signal.hidden_ND)


def as_student(folder: Path) -> torch.Tensor:
    return plain_logits(sh.Student.pretrained(folder).model)[:-1]


def as_checked(folder: Path) -> None:
    """`stillhouse check` of a recipe with this model. Raises the error that it reports."""
    text = "".join(f"Sentence number {n} of a text.\n\n" for n in range(400))
    files.write(folder.parent, "text.txt", text)
    raw = {
        "name": "tiny",
        "folder": str(folder.parent / "run"),
        "teacher": {"model": str(folder)},
        "data": {
            "sources": [{"kind": "text", "path": str(folder.parent / "text.txt"),
                         "documents": "blank-line"}],
            "context": 64, "heldout_tokens": 512,
        },
        "student": {"start": "random", "overrides": {}},
        "train": {"precision": "float32"},
    }  # fmt: skip
    for finding in check_recipe(raw, base=folder.parent):
        if finding.level == "error":
            raise ModelError(finding.text, where=finding.topic, fix=finding.fix)


def judged(
    name: str,
    folder: Path,
    expected: torch.Tensor | None,
    refusal: Refusal = "never",
    excused: tuple[str, ...] = (),
    *,
    door: str = "teacher",
) -> Trial:
    """Right if the logits are the expected ones. None: there are none."""
    read = {"teacher": as_teacher, "student": as_student, "check": as_checked}[door]

    def wrong(logits: torch.Tensor | None) -> str | None:
        if expected is None:
            return "accepted"
        if logits is None:
            return None
        rows = logits.shape[-1]
        difference = float((logits - expected[:-1, :rows]).abs().max())
        largest = float(expected.abs().max())
        same = difference <= TOLERANCE * largest
        return None if same else f"logits differ by {difference:.3g} of {largest:.3g}"

    return Trial(f"{name} ({door})", lambda: read(folder), wrong, refusal, excused=excused)


def refused(
    name: str, folder: Path, chance: random.Random, excused: tuple[str, ...] = (),
    *, doors: tuple[str, ...] = ("teacher", "student", "check"),
) -> Trial:  # fmt: skip
    return judged(name, folder, None, "must", excused, door=chance.choice(doors))


# --- sound -----------------------------------------------------------------------------------


def sound(chance: random.Random, folder: Path, number: int) -> Trial:
    """Every architecture in turn, stored in several ways."""
    architecture = list(ARCHITECTURES)[number % len(ARCHITECTURES)]
    changes: dict[str, Any] = {}
    if architecture not in ("gpt2", "cohere", "gpt_neox", "gemma2", "gemma3_text"):
        changes["tie_word_embeddings"] = chance.random() < 0.5
    if architecture in ("llama", "qwen2", "mistral") and chance.random() < 0.5:
        changes["rope_parameters"] = _rope(chance)
    path = folder / chance.choice(["model", "my model", "m[1]", "modèle"])
    save(path, architecture, **changes)
    how = chance.choice(["plain", "sharded", "bfloat16", "no generation config", "metadata"])
    if how == "sharded":
        (path / "model.safetensors").unlink()
        model = model_of(architecture, json.dumps(changes))
        model.save_pretrained(path, max_shard_size="20KB")
    elif how == "bfloat16":
        tensors = load_file(path / "model.safetensors")
        halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(halves, path / "model.safetensors", {"format": "pt"})
    elif how == "no generation config":
        (path / "generation_config.json").unlink(missing_ok=True)
    elif how == "metadata":
        tensors = load_file(path / "model.safetensors")
        save_file(tensors, path / "model.safetensors", {"format": "pt", "x": "y"})
    door = chance.choice(["teacher", "teacher", "student", "check"])
    return judged(f"sound: {architecture} {how}", path, transformers_logits(path), door=door)


def _rope(chance: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
         "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "default", "rope_theta": 7.0},
    ]  # fmt: skip
    return chance.choice(kinds)


# --- weights ---------------------------------------------------------------------------------


def _start(chance: random.Random, folder: Path, *choices: str) -> tuple[str, Path]:
    architecture = chance.choice(choices or ROTARY)
    return architecture, save(folder / "m", architecture)


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def missing_tensor(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder, *ARCHITECTURES)
    names = sorted(load_file(path / "model.safetensors"))
    name = chance.choice(names)
    _rewrite(path, lambda tensors: tensors.pop(name))
    return refused(f"no {name}", path, chance)


def surplus_tensor(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder, *ARCHITECTURES)
    name = chance.choice(
        ["model.layers.9.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.lora_A.weight",
         "value_head.weight", "model.layers.0.self_attn.q_proj.weight_scale", "extra",
         "model.layers.0.self_attn.sinks"]
    )  # fmt: skip
    _rewrite(path, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    return refused(f"{name} besides", path, chance, ("tensor", "weight"))


def old_buffers(chance: random.Random, folder: Path) -> Trial:
    """Buffers that older versions of transformers stored beside the weights change nothing."""
    architecture, path = _start(chance, folder, "llama", "gpt2")
    expected = plain_logits(model_of(architecture))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    buffer = 1e4 ** -(torch.arange(0, 8, 2).float() / 8)
    if architecture == "gpt2":
        name, buffer = "transformer.h.0.attn.bias", torch.ones(1, 1, 256, 256).tril()
    _rewrite(path, lambda tensors: tensors.update({name: buffer}))
    return judged(f"the old buffer {name}", path, expected, "may")


def wrong_shape(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder, *ARCHITECTURES)
    tensors = load_file(path / "model.safetensors")
    name = chance.choice([name for name, tensor in tensors.items() if tensor.ndim == 2])
    cut = chance.choice(
        [lambda t: t[:-1], lambda t: t[:, :-1], lambda t: torch.cat([t, t]), lambda t: t.flatten()]
    )
    _rewrite(path, lambda tensors: tensors.update({name: cut(tensors[name]).contiguous()}))
    return refused(f"{name} of another shape", path, chance)


def not_finite(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder, *ARCHITECTURES)
    value = chance.choice([float("nan"), float("inf"), -float("inf")])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[chance.choice(sorted(tensors))]
        tensor.view(-1)[chance.randrange(tensor.numel())] = value

    _rewrite(path, spoil)
    return refused(f"a weight that is {value}", path, chance, doors=("teacher", "student"))


def odd_types(chance: random.Random, folder: Path) -> Trial:
    """Weights of whole numbers or truth values are no weights without their scales."""
    _, path = _start(chance, folder)
    kind = chance.choice([torch.int8, torch.bool, torch.int64, torch.uint8])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("q_proj.weight"):
                tensors[name] = (tensors[name] * 10).to(kind)

    _rewrite(path, spoil)
    return refused(f"weights of {kind}", path, chance)


def damaged_file(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder)
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
    _, path = _start(chance, folder)
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
    _, path = _start(chance, folder)
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
    """Files beside a whole model that nothing refers to."""
    architecture, path = _start(chance, folder)
    name = chance.choice(["old.safetensors", "optimizer.pt", "README.md", "pytorch_model.bin"])
    files.write(path, name, (path / "model.safetensors").read_bytes())
    return judged(f"{name} besides", path, plain_logits(model_of(architecture)))


def adapter(chance: random.Random, folder: Path) -> Trial:
    """An adapter beside the model: whoever loads the folder wants both, or neither."""
    _, path = _start(chance, folder)
    config = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4, "lora_alpha": 8,
              "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip
    files.write(path, "adapter_config.json", json.dumps(config))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 32)},
              path / "adapter_model.safetensors")  # fmt: skip
    if chance.random() < 0.3:
        (path / "config.json").unlink()
    return refused("an adapter beside the model", path, chance, ("adapter",))


# --- configuration ---------------------------------------------------------------------------


def _edit(path: Path, file: str = "config.json", **changes: Any) -> None:
    content = json.loads((path / file).read_text())
    content.update(changes)
    (path / file).write_text(json.dumps(content))


def other_mathematics(chance: random.Random, folder: Path) -> Trial:
    """Keys that make another model of the same tensors: transformers knows what they mean."""
    _, path = _start(chance, folder, "llama", "mistral", "qwen2")
    name, value = chance.choice(
        [
            ("rope_theta", 500.0), ("rms_norm_eps", 0.1), ("hidden_act", "gelu"),
            ("rope_scaling", {"type": "linear", "factor": 8.0}),
            ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
            ("num_attention_heads", 8), ("use_cache", False), ("torch_dtype", "float16"),
        ]
    )  # fmt: skip
    if name == "num_attention_heads":
        _edit(path, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    elif name.startswith("rope"):
        content = json.loads((path / "config.json").read_text())
        content.pop("rope_parameters", None)
        (path / "config.json").write_text(json.dumps({**content, name: value}))
    else:
        _edit(path, **{name: value})
    return judged(f"{name}: {value}", path, transformers_logits(path))


def broken_config(chance: random.Random, folder: Path) -> Trial:
    """Values that fit neither the tensors nor any model."""
    _, path = _start(chance, folder)
    name, value = chance.choice(
        [
            ("num_hidden_layers", 1), ("num_hidden_layers", 3), ("hidden_size", 48),
            ("vocab_size", VOCABULARY - 3), ("vocab_size", VOCABULARY + 7),
            ("intermediate_size", 32), ("hidden_act", "nonsense"), ("model_type", "nonsense"),
            ("model_type", None), ("num_attention_heads", 0), ("num_attention_heads", "four"),
            ("num_hidden_layers", -1), ("hidden_size", 32.5), ("num_hidden_layers", 10**9),
            ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 1e4}),
            ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
            ("rms_norm_eps", "tiny"), ("num_key_value_heads", 3), ("head_dim", 7),
        ]
    )  # fmt: skip
    _edit(path, **{name: value})
    return refused(f"config: {name} {value}", path, chance)


def quantized(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder)
    method = chance.choice(["nonsense", "gptq", "awq", "exl2", None, 7])
    _edit(path, quantization_config={"quant_method": method, "bits": 4})
    return refused(f"quant_method {method}", path, chance)


def config_text(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder)
    file = path / "config.json"
    text = file.read_text()
    name, data = chance.choice(
        [
            ("empty", b""), ("a list", b"[]"), ("null", b"null"), ("cut", text[:40].encode()),
            ("Git LFS pointer", files.LFS_POINTER.encode()), ("UTF-16", text.encode("utf-16")),
            ("a trailing comma", text.replace("\n}", ",\n}").encode()), ("empty object", b"{}"),
            ("deep", b'{"a":' * 5000 + b"1" + b"}" * 5000), ("Latin-1", b'{"a": "\xe9"}'),
            ("huge number", (text[:-3] + ', "n": ' + "9" * 5000 + "}").encode()),
        ]
    )  # fmt: skip
    file.write_bytes(data)
    return refused(f"config.json: {name}", path, chance)


def double_config_keys(chance: random.Random, folder: Path) -> Trial:
    """Equal keys with two values: one of them is not what its writer meant."""
    _, path = _start(chance, folder)
    file = path / "config.json"
    file.write_text(file.read_text().rstrip()[:-1] + ', "rms_norm_eps": 0.5}')
    return refused("config.json: equal keys", path, chance)


def remote_code(chance: random.Random, folder: Path) -> Trial:
    """Code that comes with a model must not run unless the recipe allows it."""
    _, path = _start(chance, folder)
    mark = folder / "ran"
    files.write(path, "modeling_x.py", f"open({str(mark)!r}, 'w')\nclass X: ...\n")
    auto = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"}
    _edit(path, auto_map=auto, **({"model_type": "x"} if chance.random() < 0.5 else {}))
    trial = judged("code beside the model", path, None, "must")
    expected = transformers_logits(path) if json.loads((path / "config.json").read_text())[
        "model_type"] != "x" else None  # fmt: skip

    def wrong(logits: torch.Tensor) -> str | None:
        if mark.exists():
            return "the code ran"
        if expected is None:
            return "accepted"
        return judged("", path, expected).wrong(logits)

    return Trial(trial.name, trial.read, wrong, "may" if expected is not None else "must")


def bidirectional(chance: random.Random, folder: Path) -> Trial:
    """Attention in both directions: such a model sees the token that it predicts."""
    path = save(folder / "m", "gemma3_text")
    _edit(path, use_bidirectional_attention=True)
    return refused("attention in both directions", path, chance)


def end_token(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder)
    value: Any = chance.choice([10**6, -5, [2, 10**6], "two", 1.5])
    file = chance.choice(["generation_config.json", "config.json"])
    if not (path / file).exists():
        file = "config.json"
    _edit(path, file, eos_token_id=value)
    return refused(f"{file}: eos_token_id {value}", path, chance, ("eos",))


# --- other kinds of models -------------------------------------------------------------------


def encoder(chance: random.Random, folder: Path) -> Trial:
    path = folder / "m"
    kind = chance.choice(["bert", "modernbert", "roberta", "t5", "bart", "vit", "clip"])
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    if kind == "t5":
        sizes = {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "num_heads": 4,
                 "d_kv": 8, "d_ff": 64}  # fmt: skip
    elif kind == "bart":
        sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                 "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
    elif kind == "clip":
        sizes = {}
    elif kind == "modernbert":
        sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                  "sep_token_id": 2, "global_attn_every_n_layers": 1}  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes)
    if kind == "clip":
        path.mkdir()
        config.save_pretrained(path)
        save_file({"x": torch.ones(2)}, path / "model.safetensors", {"format": "pt"})
    else:
        whole = AutoModelForSeq2SeqLM if kind in ("t5", "bart") else AutoModel
        if kind in ("bert", "roberta", "modernbert") and chance.random() < 0.5:
            from transformers import AutoModelForMaskedLM as whole
        whole.from_config(config).save_pretrained(path)
    WORDS.save_pretrained(path)
    return refused(f"{kind} as a language model", path, chance)


def classifier(chance: random.Random, folder: Path) -> Trial:
    """A classifier's folder has no language-model head."""
    from transformers import AutoModelForSequenceClassification

    path = folder / "m"
    config = AutoConfig.for_model("llama", **{**_SIZES, "tie_word_embeddings": False})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    WORDS.save_pretrained(path)
    return refused("a classifier as a language model", path, chance)


# --- tokenizers ------------------------------------------------------------------------------


def padded_rows(chance: random.Random, folder: Path) -> Trial:
    """More rows than tokens: padding, which is never predicted."""
    path = save(folder / "m", "llama", vocab_size=VOCABULARY + chance.choice([1, 5, 64]))
    return judged("rows beyond the tokenizer", path, transformers_logits(path))


def large_tokenizer(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder)
    content = json.loads((path / "tokenizer.json").read_text())
    for n in range(12):
        new = {**content["added_tokens"][0], "id": len(WORDS) + n, "content": f"<|new{n}|>"}
        content["added_tokens"].append(new)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return refused("tokens without a row", path, chance)


def broken_tokenizer(chance: random.Random, folder: Path) -> Trial:
    _, path = _start(chance, folder)
    file = path / "tokenizer.json"
    how, data = chance.choice(
        [
            ("none", None), ("empty", b""), ("Git LFS pointer", files.LFS_POINTER.encode()),
            ("cut", file.read_bytes()[:500]), ("a list", b"[]"), ("empty object", b"{}"),
        ]
    )  # fmt: skip
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    return refused(f"tokenizer.json: {how}", path, chance)


def tokenizer_config(chance: random.Random, folder: Path) -> Trial:
    """A damaged tokenizer_config.json; without one, transformers has defaults."""
    _, path = _start(chance, folder)
    file = path / "tokenizer_config.json"
    how, data = chance.choice(
        [("empty", b""), ("cut", file.read_bytes()[:30]), ("pointer", files.LFS_POINTER.encode()),
         ("a list", b"[]")]
    )  # fmt: skip
    file.write_bytes(data)
    return refused(f"tokenizer_config.json: {how}", path, chance)


def two_models(chance: random.Random, folder: Path) -> Trial:
    """The configuration of one model with the weights of another."""
    one, other = chance.sample(["llama", "gemma2", "gpt2", "phi3", "olmo2", "gpt_neox"], 2)
    path = save(folder / "m", one)
    shutil.copy(save(folder / "other", other) / "config.json", path / "config.json")
    return refused(f"weights of {one}, configuration of {other}", path, chance)


QUIRKS: tuple[Quirk, ...] = (
    missing_tensor, surplus_tensor, old_buffers, wrong_shape, not_finite, odd_types, damaged_file,
    no_weights, shards, surplus_files, adapter, other_mathematics, broken_config, broken_config,
    quantized, config_text, double_config_keys, remote_code, bidirectional, end_token, encoder,
    encoder, classifier, padded_rows, large_tokenizer, broken_tokenizer, tokenizer_config,
    two_models,
)  # fmt: skip
