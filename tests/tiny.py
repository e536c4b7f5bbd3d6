"""Building blocks for tests: a byte tokenizer, a tiny random Llama, text with some structure."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stillhouse.config.load_recipe import parse_recipe
from stillhouse.language_model.recipe import Recipe

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that it tokenizes any text; `<|end|>` is EOS and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
    )


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a few merges, which the byte-level BPE of every real model has."""
    words = tokenizer()
    vocabulary = dict(sorted(words.get_vocab().items(), key=lambda item: item[1]))
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("a", "t")]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    words.backend_tokenizer.model = models.BPE(vocabulary, merges)
    return words


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def llama_config(**changes: Any) -> LlamaConfig:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **changes,
    }
    return LlamaConfig(**values)


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    llama(seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text(sentences: int, seed: int = 0) -> str:
    """Sentences of a few words, one per line."""
    chance = random.Random(seed)
    who = ["the cat", "a dog", "my friend", "the old man", "she"]
    does = ["sees", "finds", "likes", "draws", "carries"]
    what = ["a tree", "the house", "two apples", "nothing", "a letter"]
    lines = (
        f"{chance.choice(who)} {chance.choice(does)} {chance.choice(what)} {number}."
        for number in range(sentences)
    )
    return "\n".join(lines) + "\n"


def recipe(folder: Path, /, **sections: Any) -> dict[str, Any]:
    """A complete recipe with a tiny teacher, which is created in `folder` if it does not exist."""
    if not (folder / "teacher").exists():
        save_model(folder / "teacher")
        (folder / "text.txt").write_text(text(400))
    raw: dict[str, Any] = {
        "name": "tiny",
        "folder": str(folder / "run"),
        "teacher": {"model": str(folder / "teacher"), "license": "apache-2.0"},
        "data": {
            "sources": [{"kind": "text", "path": str(folder / "text.txt"), "documents": "line"}],
            "context": 32,
            "heldout_tokens": 512,
            "train_tokens": 1700,
        },
        "student": {"start": "pruned", "ffn_size": 32, "calibration_tokens": 512},
        "train": {"batch_size": 4, "checkpoint_every": 5, "precision": "float32"},
        "evaluate": {"prompts": ["the cat"], "max_new_tokens": 4, "speed": False},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return raw


def parsed(raw: dict[str, Any]) -> Recipe:
    """Parse a recipe, which must describe a language model or a family."""
    found = parse_recipe(raw)
    assert isinstance(found, Recipe)
    return found
