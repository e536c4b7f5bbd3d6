"""Small problems for losses with a teacher that has a different tokenizer.

See bench/conformance.py.

Shapes: L student tokens, M teacher tokens, V student vocabulary, W teacher vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(merges: Sequence[str], order: int = 0) -> Any:
    """Make byte-level BPE with these merges, given as "first second". order: seed of the ids."""
    pairs = [(first, second) for first, second in (merge.split() for merge in merges)]
    tokens = [END, *ALPHABET, *(first + second for first, second in pairs)]
    g = torch.Generator().manual_seed(order)
    ids = torch.randperm(len(tokens), generator=g).tolist()
    core = Tokenizer(models.BPE(dict(zip(tokens, ids, strict=True)), pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


@dataclass
class Side:
    """One model's tokens of a text between two END tokens, and its logits. Row n predicts token
    n + 1; the last row predicts nothing."""

    words: Any
    ids_L: Tensor
    logits_LV: Tensor

    def offsets(self) -> Tensor:
        """The first byte of each token in the text, and the byte after its last, [L, 2]."""
        found, done = [(0, 0)], 0
        for id in self.ids_L[1:-1].tolist():
            size = len(self.words.convert_ids_to_tokens(id))  # one character per byte
            found.append((done, done + size))
            done += size
        return torch.tensor([*found, (done, done)])


@dataclass
class TokenizerProblem:
    """Two models' views of a text. seen: text that determines which roots can be merged."""

    student: Side
    teacher: Side
    seen: Sequence[str] = field(default_factory=list)


def side(words: Any, text: str, seed: int, scale: float = 1.0) -> Side:
    """Tokenize a text and add random logits."""
    end = words.eos_token_id
    ids_L = torch.tensor([end, *words(text, add_special_tokens=False)["input_ids"], end])
    g = torch.Generator().manual_seed(seed)
    logits_LV = torch.randn(len(ids_L), len(words), generator=g, dtype=torch.float64) * scale
    return Side(words, ids_L, logits_LV)


def problem(
    student: Any, teacher: Any, text: str, *, seen: Sequence[str] = (), seed: int = 0
) -> TokenizerProblem:
    return TokenizerProblem(side(student, text, seed), side(teacher, text, seed + 1), list(seen))
