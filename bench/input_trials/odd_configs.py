"""Trials with unsuitable configurations, tokenizers, and kinds of models."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import stillhouse as sh
from bench.input_trials import files
from bench.input_trials.models import (
    SIZES,
    VOCABULARY,
    WORDS,
    Quirk,
    edit,
    judged,
    refused,
    save,
    start,
    transformers_logits,
)  # fmt: skip
from bench.input_trials.trial import Trial


def other_mathematics(chance: random.Random, folder: Path) -> Trial:
    """Keys that change the model that the tensors define; transformers is the oracle."""
    _, path = start(chance, folder, "llama", "mistral", "qwen2")
    name, value = chance.choice(
        [
            ("rope_theta", 500.0), ("rms_norm_eps", 0.1), ("hidden_act", "gelu"),
            ("rope_scaling", {"type": "linear", "factor": 8.0}),
            ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
            ("num_attention_heads", 8), ("use_cache", False), ("torch_dtype", "float16"),
        ]
    )  # fmt: skip
    if name == "num_attention_heads":
        edit(path, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4})
    elif name.startswith("rope"):
        content = json.loads((path / "config.json").read_text())
        content.pop("rope_parameters", None)
        (path / "config.json").write_text(json.dumps({**content, name: value}))
    else:
        edit(path, {name: value})
    return judged(f"{name}: {value}", path, transformers_logits(path))


def broken_config(chance: random.Random, folder: Path) -> Trial:
    """Values that do not fit the tensors, or any model."""
    _, path = start(chance, folder)
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
    edit(path, {name: value})
    return refused(f"config: {name} {value}", path, chance)


def quantized(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
    method = chance.choice(["nonsense", "gptq", "awq", "exl2", None, 7])
    edit(path, {"quantization_config": {"quant_method": method, "bits": 4}})
    return refused(f"quant_method {method}", path, chance)


def config_text(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
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
    """A key given twice with two values: one of them is not what the author meant."""
    _, path = start(chance, folder)
    file = path / "config.json"
    file.write_text(file.read_text().rstrip()[:-1] + ', "rms_norm_eps": 0.5}')
    return refused("config.json: equal keys", path, chance)


def remote_code(chance: random.Random, folder: Path) -> Trial:
    """Code included with a model must not run unless the recipe allows it."""
    _, path = start(chance, folder)
    mark = folder / "ran"
    files.write(path, "modeling_x.py", f"open({str(mark)!r}, 'w')\nclass X: ...\n")
    auto = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"}
    edit(path, {"auto_map": auto, **({"model_type": "x"} if chance.random() < 0.5 else {})})
    trial = judged("code next to the model", path, None, "must")
    expected = transformers_logits(path) if json.loads((path / "config.json").read_text())[
        "model_type"] != "x" else None  # fmt: skip

    def wrong(logits: torch.Tensor) -> str | None:
        if mark.exists():
            return "the code ran"
        if expected is None:
            return "accepted"
        return judged("", path, expected).wrong(logits)

    return Trial(trial.name, trial.read, wrong, "may" if expected is not None else "must")


def other_class(chance: random.Random, folder: Path) -> Trial:
    """`architectures` names a class without an LM head."""
    _, path = start(chance, folder, "llama")
    edit(path, {"architectures": ["LlamaForSequenceClassification"]})
    expected = transformers_logits(path)
    return judged("architectures: a classifier", path, expected, "may")


def bidirectional(chance: random.Random, folder: Path) -> Trial:
    """Bidirectional attention: such a model sees the token that it predicts."""
    path = save(folder / "m", "gemma3_text")
    edit(path, {"use_bidirectional_attention": True})
    return refused("attention in both directions", path, chance)


def end_token(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
    value: Any = chance.choice([10**6, -5, [10**6, -5], "two", 1.5])
    file = chance.choice(["generation_config.json", "config.json"])
    if not (path / file).exists():
        file = "config.json"
    edit(path, {"eos_token_id": value}, file)
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
        whole: Any = AutoModelForSeq2SeqLM if kind in ("t5", "bart") else AutoModel
        if kind in ("bert", "roberta", "modernbert") and chance.random() < 0.5:
            whole = AutoModelForMaskedLM
        whole.from_config(config).save_pretrained(path)
    WORDS.save_pretrained(path)
    return refused(f"{kind} as a language model", path, chance)


def classifier(chance: random.Random, folder: Path) -> Trial:
    """A classifier's folder has no LM head."""
    path = folder / "m"
    config = AutoConfig.for_model("llama", **{**SIZES, "tie_word_embeddings": False})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    WORDS.save_pretrained(path)
    return refused("a classifier as a language model", path, chance)


# --- tokenizers ------------------------------------------------------------------------------


def padded_rows(chance: random.Random, folder: Path) -> Trial:
    """More embedding rows than tokens: padding, which is never predicted."""
    path = save(folder / "m", "llama", vocab_size=VOCABULARY + chance.choice([1, 5, 64]))
    return judged("rows beyond the tokenizer", path, transformers_logits(path))


def large_tokenizer(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
    content = json.loads((path / "tokenizer.json").read_text())
    for n in range(12):
        new = {**content["added_tokens"][0], "id": len(WORDS) + n, "content": f"<|new{n}|>"}
        content["added_tokens"].append(new)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return refused("tokens without a row", path, chance)


def broken_tokenizer(chance: random.Random, folder: Path) -> Trial:
    _, path = start(chance, folder)
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


def tokenizer_rules(chance: random.Random, folder: Path) -> Trial:
    """A tokenizer.json with rules that the class chosen by transformers does not have."""
    path = save(folder / "m", chance.choice(["llama", "qwen2", "qwen3", "gpt2"]))
    edit(path, {"normalizer": {"type": "Lowercase"}}, "tokenizer.json")
    names = ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast", "Qwen2Tokenizer"]
    edit(path, {"tokenizer_class": chance.choice(names)}, "tokenizer_config.json")
    text = "In 2023 the CAT paid 650841823"
    expected = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids

    def wrong(tokenizer: Any) -> str | None:
        found = tokenizer(text)["input_ids"]
        return None if found == expected else f"tokens {found}, by tokenizer.json {expected}"

    def read() -> Any:
        return sh.Teacher.load(path, dtype="float32", device="cpu").tokenizer

    return Trial("rules in tokenizer.json", read, wrong, excused=("tokenizer.json",))


def tokenizer_config(chance: random.Random, folder: Path) -> Trial:
    """A damaged tokenizer_config.json. Without this file, transformers uses defaults."""
    _, path = start(chance, folder)
    file = path / "tokenizer_config.json"
    how, data = chance.choice(
        [("empty", b""), ("cut", file.read_bytes()[:30]), ("pointer", files.LFS_POINTER.encode()),
         ("a list", b"[]")]
    )  # fmt: skip
    file.write_bytes(data)
    return refused(f"tokenizer_config.json: {how}", path, chance)


def two_models(chance: random.Random, folder: Path) -> Trial:
    """One model's configuration with another model's weights."""
    one, other = chance.sample(["llama", "gemma2", "gpt2", "phi3", "olmo2", "gpt_neox"], 2)
    path = save(folder / "m", one)
    shutil.copy(save(folder / "other", other) / "config.json", path / "config.json")
    return refused(f"weights of {one}, configuration of {other}", path, chance)


QUIRKS: tuple[Quirk, ...] = (
    other_class,
    other_mathematics, broken_config, broken_config, quantized, config_text, double_config_keys,
    remote_code, bidirectional, end_token, encoder, encoder, classifier,
    padded_rows, tokenizer_rules, large_tokenizer, broken_tokenizer, tokenizer_config, two_models,
)  # fmt: skip
