"""Rewrite a tokenizer for fewer tokens, so that it can still encode and decode any text.

This works for BPE only: if every character of a token, or every byte, is in the vocabulary, text
whose token was removed is split into smaller ones. A merge (a, b) → ab works while all three are
kept.

BPE builds a token in one way, whatever surrounds it: no merge ever crosses its boundaries.
So if the tokens of a text and the tokens on the way to them are kept, it is tokenized as before,
with other ids.
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
"""How BPE with byte fallback writes a space: bytes would not decode to a space."""


class Merges:
    """The tokens of a BPE tokenizer, and their merges.

    Raises RecipeError for other tokenizers, and for one that cannot encode every text.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
        self.model = self.content.get("model", {})
        kind = self.model.get("type", type(tokenizer).__name__)
        if kind != "BPE":
            raise _uncuttable(f"a tokenizer of type {kind} cannot be cut: only BPE can")
        if self.model.get("continuing_subword_prefix") or self.model.get("end_of_word_suffix"):
            raise _uncuttable("a BPE tokenizer that marks the inside or end of words is unknown")
        self.ids: dict[str, int] = self.model["vocab"]
        self.pairs: list[tuple[str, str]] = [tuple(pair) for pair in self.model["merges"]]
        self.added: dict[int, str] = {
            one["id"]: one["content"] for one in self.content["added_tokens"]
        }
        self.added_ids = {content: id for id, content in self.added.items()}
        self.every_id = {**self.ids, **self.added_ids}
        self.tokens = {id: token for token, id in self.every_id.items()}

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(self.pairs)))}

    def alphabet(self) -> set[int]:
        """The ids without which some text could not be written: one for every byte.

        Some tokenizers lack bytes themselves (13 never occur in UTF-8); what they cannot encode,
        the cut one cannot either. Raises RecipeError if the tokenizer is not byte-based at all.
        """
        if self.model.get("byte_fallback"):
            needed = [*(f"<0x{byte:02X}>" for byte in range(256)), WORD_START]
        elif '"ByteLevel"' in json.dumps([self.content["pre_tokenizer"], self.content["decoder"]]):
            needed = pre_tokenizers.ByteLevel.alphabet()
        else:
            raise _uncuttable(
                "this tokenizer has no tokens for single bytes: without the tokens that go, it "
                "could not read every text"
            )
        found = {self.ids[token] for token in needed if token in self.ids}
        unknown = self.model.get("unk_token")
        return found | ({self.ids[unknown]} if unknown in self.ids else set())

    def parts(self, id: int) -> set[int]:
        """A token, and the tokens on the way to it from its characters, if merges lead to it."""
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
        """The content of tokenizer.json with the tokens `kept_ids`, renumbered in that order."""
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
    """Renumber token ids inside a post-processor, which may be a sequence of post-processors."""
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
    """The tokenizer with only the tokens `kept_ids`, old ids by new id; the chat template is
    unchanged.

    Ids beyond the tokenizer's (padding rows of the model) have no token. Raises
    RecipeError when added or special tokens, or tokens for single bytes, are not kept, when a token
    comes twice, and for tokenizers that are not BPE.
    """
    merges = Merges(tokenizer)
    kept = set(kept_ids)
    if len(kept) != len(kept_ids):
        raise _wrong("a token comes twice", "name every token id once")
    for what, needed in (
        ("special or added tokens", merges.added.keys()),
        ("tokens for single bytes, without which some text cannot be written", merges.alphabet()),
    ):
        lost = sorted(needed - kept)
        if lost:
            examples = ", ".join(f"{merges.tokens[id]!r} ({id})" for id in lost[:3])
            raise _wrong(
                f"the vocabulary would lose {len(lost)} {what}: {examples}",
                f"add them: {len(kept) + len(lost)} tokens (`kept_token_ids` does)",
            )
    with temporary_folder("stillhouse-") as place:
        folder = Path(place)
        tokenizer.save_pretrained(folder)
        content = json.dumps(merges.cut(kept_ids), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        _renumber_config(folder / "tokenizer_config.json", kept_ids)
        return load_tokenizer(folder)


def _renumber_config(file: Path, kept_ids: Sequence[int]) -> None:
    """Older tokenizer_config.json files repeat the added tokens by their ids."""
    config = json.loads(file.read_text(encoding="utf-8"))
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    added = config.get("added_tokens_decoder")
    if isinstance(added, dict):
        config["added_tokens_decoder"] = {
            str(new_ids[int(old)]): value for old, value in added.items()
        }
        file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def _uncuttable(what: str) -> RecipeError:
    return RecipeError(
        what,
        where="student.vocabulary",
        fix="leave student.vocabulary out: every other axis can be pruned",
    )


def _wrong(what: str, fix: str) -> RecipeError:
    return RecipeError(what, where="student.vocabulary", fix=fix)
