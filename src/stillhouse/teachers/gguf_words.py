"""A GGUF file's tokenizer as transformers reads it, with the pre-tokenizer that the file names.

A file stores only the name of its rules for splitting text (`tokenizer.ggml.pre`). transformers
knows some of these names and uses GPT-2's rules for all others, which can silently split text
differently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from stillhouse.progress import note
from stillhouse.teachers.gguf_keys import UnreadableGGUFError

READ_BY_TRANSFORMERS = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
        *("qwen35", "gpt-4o", "llama4", "kanana2"),
    }
)
GPT_2 = frozenset({"gpt-2", "phi-2", "olmo", "jais", "trillion", "mpt", "exaone4", "a.x-4.0"})
DIGITS_APART = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
)
_LETTERS_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "stablelm2": [_LETTERS_OF_LLAMA_3.replace("{1,3}", "")],
    "hunyuan": [_LETTERS_OF_LLAMA_3.replace("{1,3}", "")],
    "chatglm-bpe": [_LETTERS_OF_LLAMA_3],
    "glm4": [_LETTERS_OF_LLAMA_3],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}
"""Regular expressions that split text one after another, by llama.cpp's name for the rules."""

WHOLE_WORDS = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("tekken", "glm4"),
    }
)
"""Rules under which a word that is a token stays one token, regardless of the merges."""
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens in transformers, and their names in a file's keys."""


def read_tokenizer(path: Path, reader: gguf.GGUFReader) -> Any:
    """Read the file's tokenizer, with exactly the file's tokens.

    Raises UnreadableGGUFError: unknown rules for splitting text.
    """
    base = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    state = json.loads(base.backend_tokenizer.to_str())
    found = {
        key: reader.fields[f"tokenizer.ggml.{key}"].contents()
        for key in ("model", "pre", "add_space_prefix")
        if f"tokenizer.ggml.{key}" in reader.fields
    }
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    if found.get("model") == "gpt2":
        _set_rules(state, found.get("pre"), path)
    elif found.get("add_space_prefix") is False:
        _no_space_first(state)
    _forget_rows_without_tokens(state, tokens)
    roles = {
        role: getattr(base, role)
        for role, name in _ROLES.items()
        if f"tokenizer.ggml.{name}_token_id" in reader.fields
    }
    special = [added["content"] for added in state["added_tokens"] if added["special"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        additional_special_tokens=[word for word in special if word not in roles.values()],
        chat_template=base.chat_template,
        **roles,
    )


def _set_rules(state: dict[str, Any], name: str | None, path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name in (None, "default"):
        note(f"{path.name} does not define how its tokenizer splits text; using GPT-2's rules")
    elif name in DIGITS_APART:
        digits = {"type": "Digits", "individual_digits": True}
        parts = [digits, {**byte_level, "use_regex": True}]
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    elif name in SPLITS:
        split = {"type": "Split", "behavior": "Isolated", "invert": False}
        parts = [{**split, "pattern": {"Regex": expression}} for expression in SPLITS[name]]
        parts.append({**byte_level, "use_regex": False})
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    elif name not in GPT_2 | READ_BY_TRANSFORMERS:
        raise UnreadableGGUFError(f"its tokenizer splits text by unknown rules ({name})")
    if name in WHOLE_WORDS:
        state["model"]["ignore_merges"] = True


def _no_space_first(state: dict[str, Any]) -> None:
    """Do not add a space at the start of text."""
    rules = state["pre_tokenizer"]
    if rules is not None and rules["type"] == "Metaspace":
        rules["prepend_scheme"] = "never"
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer["type"] == "Sequence":
        kept = [each for each in normalizer["normalizers"] if each["type"] != "Prepend"]
        normalizer["normalizers"] = kept


def _forget_rows_without_tokens(state: dict[str, Any], tokens: list[str]) -> None:
    """Remove the rows that pad a file's embedding, and the tokens that transformers adds to it."""
    count = len(tokens)
    while count and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < count}
    state["added_tokens"] = [each for each in state["added_tokens"] if each["id"] < count]
