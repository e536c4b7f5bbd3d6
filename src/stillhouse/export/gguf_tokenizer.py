"""The tokenizer of a Hugging Face folder as GGUF metadata: byte-level BPE, which small models have.

llama.cpp does not read a tokenizer's rules from the file. It knows some by name, so what matters is
that the name written is that of the rules which the tokenizer really has.
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from stillhouse.errors import ModelError

SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
"""Regular expressions by which a text is cut before merging, and llama.cpp's names of them."""

KNOWN_TO_TRANSFORMERS = ("gpt-2", "qwen2", "llama-bpe")
"""Names by which transformers' GGUF loader restores the same rules; it takes others for GPT-2's."""


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Writes vocabulary, merges, special tokens and chat template.

    rows: of the model's embedding; ids that the tokenizer does not have become unused tokens.
    Raises ModelError: a tokenizer that GGUF cannot hold.
    """
    state = tokenizer_state(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
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
    merges = state["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    _add_special_tokens(writer, tokenizer)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            add(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """The content of tokenizer.json. Raises ModelError where it is no byte-level BPE."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(core.to_str()) if core is not None else {}
    model = state.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = model.get("type", type(tokenizer).__name__)
        raise _unknown(f"a {'SentencePiece-like ' if model.get('byte_fallback') else ''}{kind} one")
    if not model["merges"]:
        raise _unknown("one without merges")
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unknown(f"one that normalizes text ({normalizer['type']})")
    return state


def pre_tokenizer_name(tokenizer: Any) -> str:
    """llama.cpp's name for how this tokenizer cuts a text. Raises ModelError: it has none."""
    rules = tokenizer_state(tokenizer)["pre_tokenizer"] or {"type": "none"}
    parts = rules["pretokenizers"] if rules["type"] == "Sequence" else [rules]
    kinds = [part["type"] for part in parts]
    last = parts[-1]
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and last["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            name = SPLITS.get(parts[0]["pattern"].get("Regex"))
            if name and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]:
                return name
    raise _unknown(f"one that cuts text by {', '.join(kinds)} rules of its own")


def _unknown(kind: str) -> ModelError:
    return ModelError(
        f"the GGUF writer does not know this tokenizer: it is {kind}",
        where="export.formats",
        fix="byte-level BPE as in GPT-2, SmolLM, Llama 3 and Qwen can be written; for others "
        "export safetensors, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
    )
