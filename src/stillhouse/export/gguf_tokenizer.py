"""A Hugging Face folder's tokenizer as GGUF metadata: BPE on bytes or on characters.

llama.cpp does not read a tokenizer's rules from the file. It implements named sets of rules, so the
name in the file must match the tokenizer's actual rules. For SentencePiece-like BPE, on characters
with tokens for single bytes, see `gguf_sentencepiece`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gguf

from stillhouse.data.turn_end import turn_end
from stillhouse.export.gguf_model import unknown_tokenizer
from stillhouse.export.gguf_sentencepiece import (
    Pieces,
    add_pieces,
    pieces_of,
    pieces_otherwise_by_transformers,
)
from stillhouse.teachers.gguf_families import Family

Names = tuple[str | None, str | None]
"""llama.cpp's names for a set of rules: without `ignore_merges` in tokenizer.json, and with it (a
word that is a token is then kept, whatever the merges). None if llama.cpp has no name for it."""

SPLITS: dict[str, Names] = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": ("qwen2", None),
    # GPT-4's, as in OLMo 2; with ignore_merges, Llama 3's.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": ("dbrx", "llama-bpe"),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": (None, "tekken"),
}
"""Regular expressions that split a text before merging."""

KNOWN_TO_TRANSFORMERS = ("gpt-2", "qwen2", "llama-bpe", "dbrx", "tekken")
"""Names whose rules transformers' GGUF loader restores; for others, it uses GPT-2's rules."""


@dataclass(frozen=True)
class ByteLevel:
    """BPE on bytes. rules: llama.cpp's name for how text is split before merging."""

    rules: str
    merges: list[list[str]]


def tokenizer_in_gguf(tokenizer: Any) -> ByteLevel | Pieces:
    """The tokenizer's contents for a GGUF file. Raises ModelError if GGUF cannot store them."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {} if core is None else json.loads(core.to_str())
    model = state.get("model", {})
    if model.get("byte_fallback"):
        return pieces_of(state)
    if model.get("type") != "BPE":
        raise unknown_tokenizer(f"of type {model.get('type', type(tokenizer).__name__)}")
    if not model["merges"]:
        raise unknown_tokenizer("without merges")
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise unknown_tokenizer(f"with the normalizer {normalizer['type']}")
    names = _names(state["pre_tokenizer"] or {"type": "none"})
    keeps_words = bool(model.get("ignore_merges"))
    name = names[keeps_words]
    if name is None:
        raise unknown_tokenizer(
            f"that split text like {names[not keeps_words]}, but have ignore_merges: "
            f"{str(keeps_words).lower()}, unlike llama.cpp"
        )
    return ByteLevel(name, model["merges"])


def _names(rules: dict[str, Any]) -> Names:
    parts = rules["pretokenizers"] if rules["type"] == "Sequence" else [rules]
    kinds = [part["type"] for part in parts]
    last = parts[-1]
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2", None
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and last["use_regex"]:
            return "smollm", None
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            names = SPLITS.get(parts[0]["pattern"].get("Regex"))
            if names and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]:
                return names
    raise unknown_tokenizer(f"that split text by custom {', '.join(kinds)} rules")


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Write vocabulary, merges, special tokens, and chat templates.

    rows: number of the model's embedding rows; ids that the tokenizer does not have become unused
        tokens.

    Raises ModelError like `tokenizer_in_gguf`.
    """
    held = tokenizer_in_gguf(tokenizer)
    if isinstance(held, Pieces):
        add_pieces(writer, held, tokenizer, rows)
    else:
        _add_byte_level(writer, held, tokenizer, rows)
    _add_special_tokens(writer, tokenizer, rows)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        named = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(named)
    elif template:
        writer.add_chat_template(template)


def read_otherwise_by_transformers(held: ByteLevel | Pieces, family: Family) -> str | None:
    """A note on texts that transformers' GGUF loader tokenizes differently; None if there are
    none."""
    if isinstance(held, Pieces):
        return pieces_otherwise_by_transformers(held, family)
    if held.rules in KNOWN_TO_TRANSFORMERS:
        return None
    return (
        f"transformers' GGUF loader splits text by GPT-2's rules, not by {held.rules}'s (several "
        "digits can become one token): use the file in llama.cpp, or with the checkpoint's own "
        "tokenizer; the prompts' tokens were not compared in transformers"
    )


def _add_byte_level(writer: gguf.GGUFWriter, held: ByteLevel, tokenizer: Any, rows: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(held.rules)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(rows):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            kinds.append(gguf.TokenType.UNUSED)
        elif index not in added:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            special = added[index].special
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in held.merges])


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any, rows: int) -> None:
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = getattr(tokenizer, f"{role}_token_id")
        # transformers adds some itself, such as Qwen's padding, which the model might not have.
        if index is not None and index < rows:
            add(index)
    end = turn_end(tokenizer)
    if end is not None and end.id != tokenizer.eos_token_id:
        writer.add_eot_token_id(end.id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
