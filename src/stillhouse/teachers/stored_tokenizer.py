"""Loading of tokenizer.json exactly, where transformers' tokenizer class would change it.

transformers 5 rebuilds many tokenizers from their vocabulary and merges, with the rules of a class
that it chooses by name or architecture. It ignores the normalization and pre-tokenization in
tokenizer.json, so text can get different tokens than those the model was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from stillhouse.errors import ModelError
from stillhouse.progress import note
from stillhouse.teachers.weights import read_json

PROBES = (
    "In 2023, 650841823 people paid $1,234.50 (3.5%).",
    " Two  spaces,\ttabs\n\n and   lines\r\n  ",
    "I'm sure they'll say DON'T; we've n't it's",
    "def f(x_1):\n    return {'a': [x+1, -0.5e-3]}  # done",
    "Naïve café, ZÜRICH, I\u0307stanbul, e\u0301 ﬁne ｆｕｌｌ",
    "日本語のテキスト 한국어 中文，。 हिन्दी தமிழ் ภาษาไทย עברית العربية",
    "🙂👩‍👩‍👧‍👦 ... !!! -- a_b.c/d\\e <b>&amp;</b> \u00a0\u3000\u200b",
)
_faithful: dict[tuple[Path, int], bool] = {}
"""Whether transformers loads a file (by path and modification time) unchanged."""


def as_stored(tokenizer: Any, folder: Path) -> Any:
    """Return the tokenizer, or the one in the folder's tokenizer.json if their tokens differ."""
    file = folder / "tokenizer.json"
    if not file.is_file() or type(tokenizer).__name__ in _PLAIN or not _of_transformers(tokenizer):
        return tokenizer
    known = file.resolve(), file.stat().st_mtime_ns
    if _faithful.get(known):
        return tokenizer
    stored = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    same = len(stored) == len(tokenizer) and _tokens(stored) == _tokens(tokenizer)
    if not same and known not in _faithful:
        note(
            f"{folder}: loading the tokenizer exactly as tokenizer.json defines it; transformers' "
            f"{type(tokenizer).__name__} would tokenize text differently"
        )
    _faithful[known] = same
    return tokenizer if same else stored


def require_stored_tokens(tokenizer: Any, folder: Path) -> None:
    """Raise ModelError for an end token that is missing from the folder's tokenizer.json, so that
    transformers adds it with a new id, and for merges that are dropped at random."""
    file = folder / "tokenizer.json"
    if not file.is_file() or not _of_transformers(tokenizer):
        return
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise ModelError(
            "the tokenizer drops merges at random (dropout), so a text's tokens change every time",
            where=file,
            fix='set "dropout" of its "model" to null',
        )
    end = tokenizer.eos_token
    if end is None or tokenizer.eos_token_id < len(tokenizer) - _MOST_NEW:
        return
    if Tokenizer.from_file(str(file)).token_to_id(end) is not None:
        return
    settings = folder / "tokenizer_config.json"
    others = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    more = folder / "added_tokens.json"
    if end in str(others) or (more.is_file() and end in read_json(more)):
        return
    raise ModelError(
        f"the end token {end!r} is not in tokenizer.json, so transformers would give it a new id "
        "that the model has never generated",
        where=folder,
        fix="set eos_token in tokenizer_config.json to a token in tokenizer.json",
    )


_MOST_NEW = 16
"""Number of ids at the end of the vocabulary that can belong to newly added special tokens."""
_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes that load tokenizer.json without changes."""


def _of_transformers(tokenizer: Any) -> bool:
    """Whether this is one of transformers' fast tokenizers. A model's own tokenizer code is never
    replaced."""
    return type(tokenizer).__module__.startswith("transformers.") and tokenizer.is_fast


def _tokens(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in PROBES]
