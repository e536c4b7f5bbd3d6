"""A model to train, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from stillhouse.account import count_parameters
from stillhouse.signals import LMHead
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.load import load_model, load_tokenizer, save_tokenizer
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.shared_vocabulary import check_rows


class Student:
    """A causal language model that stays a plain transformers model, and its tokenizer.

    tokenizer: None where only token ids are known; the vocabulary is then all rows of the head.
    folder: a checkpoint that has these very weights. trust_remote_code: its code may run.
    Raises ModelError: the tokenizer has ids for which the model has no row.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        folder: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        rows = lm_head(model).weight_VD.shape[0]
        self.vocabulary = rows if tokenizer is None else check_rows(tokenizer, rows, "student")

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> Self:
        """The checkpoint in a folder, in float32. Raises ModelError as `load_model`."""
        code = trust_remote_code
        model = load_model(folder, dtype=torch.float32, trust_remote_code=code)
        tokenizer = load_tokenizer(folder, trust_remote_code=code)
        return cls(model, tokenizer, folder=folder, trust_remote_code=code)

    def remember(self) -> Callable[[], None]:
        """A function that gives the model the weights back that it has now."""
        folder = self.folder
        if folder is None:
            kept = {name: value.clone() for name, value in self.model.state_dict().items()}
            return lambda: self.model.load_state_dict(kept)

        def load() -> None:
            self.model = type(self).load(folder, trust_remote_code=self.trust_remote_code).model

        return load

    def trainable(self, *, freeze_head: bool = False) -> None:
        """Make the weights float32 and trainable, in place; all, or all but the head.

        freeze_head: leaves embeddings that are tied to the head as they are, too.
        """
        self.model.float().requires_grad_(True)
        if freeze_head:
            self.model.get_output_embeddings().requires_grad_(False)

    @property
    def frozen_head(self) -> LMHead | None:
        """The head where it is not trained and something else is."""
        head = lm_head(self.model)
        training = any(each.requires_grad for each in self.model.parameters())
        return head if training and not head.weight_VD.requires_grad else None

    @property
    def parameters(self) -> int:
        """Of the model, a tied head counted once."""
        return count_parameters(self.model).total

    def save(self, folder: str | Path) -> None:
        """Write a plain Hugging Face folder: configuration, safetensors weights and tokenizer."""
        with quiet():
            self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, Path(folder))

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"Student({type(self.model).__name__}: {self.parameters / 1e6:,.1f}M parameters in "
            f"{dtype} on {self.model.device}, {self.vocabulary:,} tokens)"
        )
