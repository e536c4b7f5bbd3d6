"""Shrink a tokenizer's vocabulary so that it can still encode and decode any text.

This only works for BPE: as long as every character of a token, or every byte, is in the vocabulary,
text whose token was removed is split into smaller tokens. A merge (a, b) → ab works as long as all
three tokens are kept.

BPE always builds a token in the same way, whatever surrounds it, since no merge crosses the token's
boundaries. So if a text's tokens and all intermediate tokens on the way to them are kept, the text
is tokenized as before, with new ids.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from stillhouse.errors import RecipeError
from stillhouse.scratch import temporary_folder
from stillhouse.teachers.load_model import load_tokenizer

WORD_START = "▁"
"""How BPE with byte fallback writes a space; always kept, since bytes would not decode to it."""


class Merges:
    """A BPE tokenizer's tokens and merges.

    Raises RecipeError if the tokenizer is not BPE, or marks the inside or end of words.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
        self.model = self.content.get("model", {})
        kind = self.model.get("type", type(tokenizer).__name__)
        if kind != "BPE":
            raise _wrong(
                f"the vocabulary of a tokenizer of type {kind} cannot be pruned: only BPE is "
                "supported"
            )
        if self.model.get("continuing_subword_prefix") or self.model.get("end_of_word_suffix"):
            raise _wrong(
                "the vocabulary cannot be pruned: BPE tokenizers that mark the inside or end of "
                "words are not supported"
            )
        self.ids: dict[str, int] = self.model["vocab"]
        self.pairs: list[tuple[str, str]] = [tuple(pair) for pair in self.model["merges"]]
        self.added: dict[int, str] = {
            one["id"]: one["content"] for one in self.content["added_tokens"]
        }
        self.every_id = self.ids | {content: id for id, content in self.added.items()}
        self.tokens = {id: token for token, id in self.every_id.items()}

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(self.pairs)))}

    def alphabet(self) -> set[int]:
        """The ids that are needed to encode any text: one for every byte.

        Some tokenizers lack bytes to begin with (13 never occur in UTF-8); what they cannot encode,
        the pruned tokenizer cannot encode either. Raises RecipeError if the tokenizer is not
        byte-based.
        """
        if self.model.get("byte_fallback"):
            needed = [*(f"<0x{byte:02X}>" for byte in range(256)), WORD_START]
        elif '"ByteLevel"' in json.dumps([self.content["pre_tokenizer"], self.content["decoder"]]):
            needed = pre_tokenizers.ByteLevel.alphabet()
        else:
            raise _wrong(
                "the vocabulary cannot be pruned: this tokenizer has no tokens for single bytes, "
                "so without the removed tokens it could not encode every text"
            )
        found = {self.ids[token] for token in needed if token in self.ids}
        unknown = self.model.get("unk_token")
        return found | ({self.ids[unknown]} if unknown in self.ids else set())

    def parts(self, id: int) -> set[int]:
        """A token, plus all intermediate tokens if merges build it from its characters."""
        token = self.tokens[id]
        if id in self.added or token not in self.ids:
            return {id}
        pieces = list(token)
        found = {self.ids[piece] for piece in pieces if piece in self.ids}
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            rank, place = min(
                (self.ranks.get(pair, len(self.pairs)), place) for place, pair in enumerate(pairs)
            )
            if rank == len(self.pairs):
                return {id}
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            found.add(self.ids[pieces[place]])
        return found | {id}

    def cut(self, kept_ids: Sequence[int]) -> dict[str, Any]:
        """The contents of tokenizer.json with only the tokens `kept_ids`, renumbered in that
        order."""
        new_ids = {old: new for new, old in enumerate(kept_ids)}
        content = copy.deepcopy(self.content)
        vocabulary = {token: new_ids[old] for token, old in self.ids.items() if old in new_ids}
        merges = [
            list(pair)
            for pair in self.pairs
            if all(piece in vocabulary for piece in (*pair, "".join(pair)))
        ]
        content["model"]["vocab"] = vocabulary
        content["model"]["merges"] = merges
        for one in content["added_tokens"]:
            one["id"] = new_ids[one["id"]]
        content["added_tokens"].sort(key=lambda one: one["id"])
        if content.get("padding"):
            content["padding"]["pad_id"] = new_ids[content["padding"]["pad_id"]]
        _renumber(content.get("post_processor"), new_ids)
        return content


def _renumber(processor: Any, new_ids: dict[int, int]) -> None:
    """Renumber token ids inside a post-processor, which can be a sequence of post-processors."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors", []):
        _renumber(inner, new_ids)
    for name in ("sep", "cls"):
        if name in processor:
            token, old = processor[name]
            processor[name] = [token, new_ids[old]]
    special = processor.get("special_tokens")
    if isinstance(special, dict):
        for one in special.values():
            one["ids"] = [new_ids[old] for old in one["ids"]]


def prune_tokenizer(tokenizer: Any, kept_ids: Sequence[int]) -> Any:
    """Return a tokenizer with only the tokens `kept_ids`; the chat template stays the same.

    kept_ids: kept_ids[new id] = old id. Ids beyond the tokenizer's (the model's padding rows) have
    no token.

    Raises RecipeError if an added token, a special token, or a token for a single byte is not kept,
    if a token is listed twice, or if the tokenizer is not BPE.
    """
    merges = Merges(tokenizer)
    kept = set(kept_ids)
    if len(kept) != len(kept_ids):
        raise _wrong("a token is listed twice", "list every token id once")
    for what, needed in (
        ("special or added tokens", merges.added.keys()),
        ("tokens for single bytes, which are needed to encode any text", merges.alphabet()),
    ):
        lost = sorted(needed - kept)
        if lost:
            examples = ", ".join(f"{merges.tokens[id]!r} ({id})" for id in lost[:3])
            raise _wrong(
                f"the vocabulary would lose {len(lost)} {what}: {examples}",
                f"keep them too, {len(kept) + len(lost)} tokens in total (`kept_token_ids` does)",
            )
    with temporary_folder("stillhouse-") as place:
        folder = Path(place)
        tokenizer.save_pretrained(folder)
        content = json.dumps(merges.cut(kept_ids), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        return load_tokenizer(folder)


def _wrong(
    what: str, fix: str = "remove student.vocabulary; every other axis can be pruned"
) -> RecipeError:
    return RecipeError(what, where="student.vocabulary", fix=fix)
