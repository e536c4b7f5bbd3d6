"""Loads exactly tokenizer.json if transformers' tokenizer class would change it.

transformers 5 rebuilds many tokenizers from their vocabulary and merges, with the rules of the
class that it chooses by name or architecture, ignoring the normalization and splitting in
tokenizer.json. The same text then has different tokens than those the model was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from stillhouse.progress import note

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
"""Whether transformers loads a file (with its modification time) unchanged."""


def as_stored(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer, or the one that the folder's tokenizer.json defines if their tokens differ."""
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
            f"{folder}: the tokenizer is loaded as tokenizer.json defines it; transformers' "
            f"{type(tokenizer).__name__} would tokenize text differently"
        )
    _faithful[known] = same
    return tokenizer if same else stored


_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes that load tokenizer.json without changes."""


def _of_transformers(tokenizer: Any) -> bool:
    """Whether it is a fast tokenizer of transformers; a model's own tokenizer code is not
    replaced."""
    return type(tokenizer).__module__.startswith("transformers.") and tokenizer.is_fast


def _tokens(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in PROBES]
