"""Teachers, which return next-token distributions for batches of tokens.

Shapes: N supervised rows of a batch, D hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.data.batches import Batch, Batches
from stillhouse.errors import SignalError
from stillhouse.hardware import Requested, choose_precision, default_device
from stillhouse.objectives import AttentionStates, Term
from stillhouse.section import made, require_tokenizer, require_type
from stillhouse.signals import ChunkSignal, LMHead, Signal
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.shared_vocabulary import check_same_ids, token_count

if TYPE_CHECKING:
    from stillhouse.signals.signals_config import SignalServer
    from stillhouse.teachers.hidden_teacher import HiddenStateTeacher
    from stillhouse.teachers.local_teacher import LocalTeacher
    from stillhouse.teachers.roots import Roots
    from stillhouse.teachers.served_teacher import ServedTeacher
    from stillhouse.teachers.stored_teacher import StoredTeacher

OUTPUT_ONLY = ActivationRequest()


@dataclass(frozen=True)
class TeacherView:
    """A teacher's outputs for one batch. Row n belongs to its n-th supervised token.

    signals: next-token distributions or likelihoods of chunks, one for each teacher; empty if there
    are none. layers: hidden states [N, D] by layer. attention: attention states by block.
    log_probs_N: log-probabilities of the text's tokens, from a teacher whose distributions are not
    complete.
    """

    signals: tuple[Signal | ChunkSignal, ...] = ()
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionStates] = field(default_factory=dict)
    log_probs_N: Tensor | None = None


@dataclass(frozen=True)
class TeacherNeeds:
    """What an objective needs from its teacher.

    terms: divergences from the teacher's distributions. activations: activations of its layers.
    tokenizer: the student's, if it is known. frozen_head: the student's head, if it is not trained.
    chunks: whether likelihoods of chunks are needed, from teachers with a different tokenizer.
    """

    terms: tuple[Term, ...] = ()
    activations: ActivationRequest = OUTPUT_ONLY
    tokenizer: Any = None
    frozen_head: LMHead | None = None
    chunks: bool = False

    @property
    def teacher(self) -> bool:
        """Whether a teacher is needed at all."""
        compared = any(term.needs_teacher for term in self.terms)
        return compared or self.chunks or bool(self.activations)


def require_chunks(teacher: Teacher, needs: TeacherNeeds) -> None:
    """Raise SignalError if likelihoods of chunks are needed and no teacher provides them."""
    if needs.chunks and not teacher.gives_chunks:
        raise SignalError(
            "a term on chunks compares text that two tokenizers divide differently, but "
            f"{teacher.described} has the student's tokenizer, or is a store of distributions",
            where="objective.terms",
            fix="remove the term, or add a teacher with a different tokenizer to train.teachers",
        )


class Teacher(ABC):
    """A model, a store of signals, a server, or several of these.

    vocabulary: number of token ids that it shares with the student; further rows of a head are
    padding. described: one line for messages. fingerprint: identifies the content.
    tokenizer: defines the ids that `answer` reads; None if only the ids are known. config: the
    model's, which terms on intermediate layers need; None: unknown.
    collective: every process must call `answer` equally often, as sharded models require.
    tokens_together: tokens per call of `answer` when a complete text is scored.
    full_distributions: the signals are complete distributions, not a few tokens at each position.
    gives_chunks: can provide likelihoods of chunks.
    """

    vocabulary: int
    described: str
    fingerprint: str
    tokenizer: Any = None
    config: Any = None
    collective: bool = False
    tokens_together: int = 2048
    full_distributions: bool = True
    gives_chunks: bool = False
    _device: torch.device | None = None

    @abstractmethod
    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        """Score the batch without gradients, and return the outputs on the device of `place`.

        batch: on the host, so that text can be looked up without waiting for a device.
        request: activations that the view must contain, in addition to the signals.
        Raises SignalError if the teacher cannot score this batch.
        """

    def prepare(self, needs: TeacherNeeds, text: Batches | None = None) -> None:
        """Prepare for training a student, on `text` if it is known.

        Raises SignalError: terms or text that this teacher does not support. ModelError: the
        student has a different vocabulary.
        """
        if self.tokenizer is not None and needs.tokenizer is not None:
            check_same_ids(self.tokenizer, needs.tokenizer)

    def place(self, device: torch.device, context: int) -> None:
        """Move to a device, for training on windows of `context` tokens.

        From then on, weights that are mapped from files are released from memory between uses.
        """
        self._device = device

    def for_heldout(self, batches: Sequence[Batch]) -> Teacher | None:
        """Return a teacher that can score all of these held-out batches; None if there is none."""
        return self

    def for_own_text(self) -> Teacher:
        """Return a teacher that can score text which the student generates during training.

        Raises SignalError if there is none.
        """
        return self

    def flops(self, tokens: int) -> int:
        """The floating-point operations on this machine for this number of tokens."""
        return 0

    def aligned(self, tokenizer: Any, roots: Roots | None = None) -> Teacher:
        """Adapt this teacher to a student's tokenizer; returns itself if all ids are the same.

        roots: of both tokenizers; if None, derived from them and merged by the training text.
        Raises ModelError: a tokenizer that does not define the bytes of its tokens, or that alters
        text.
        """
        from stillhouse.teachers.aligned_teacher import AlignedTeacher

        require_tokenizer(tokenizer)
        if self.tokenizer is None or self.tokenizer.get_vocab() == tokenizer.get_vocab():
            return self
        return AlignedTeacher(self, tokenizer, roots)

    # --- creating a teacher ---------------------------------------------------------------------

    @staticmethod
    def load(
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: Requested = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> LocalTeacher:
        """Load a model from a folder, a Hub id, a .gguf file, or pypi:PACKAGE, on this machine.

        dtype: auto is bfloat16 if the device supports it natively, otherwise float32. device: None
        is the first GPU, or else the CPU. Raises ModelError as `resolve_model` and `load_model` do.
        """
        from stillhouse.teachers.local_teacher import load_teacher
        from stillhouse.teachers.model_source import resolve_model

        require_name(model, "Teacher.from_model(model, tokenizer)")
        source = resolve_model(
            str(model), revision=revision, base=Path.cwd(), trusted=trust_remote_code
        )
        place = default_device() if device is None else torch.device(device)
        found = choose_precision(dtype, place).dtype
        teacher = load_teacher(source, dtype=found)
        teacher.model.to(place)
        return teacher

    @staticmethod
    def from_model(model: Any, tokenizer: Any = None) -> LocalTeacher:
        """Use a causal language model that is already in memory.

        Raises ModelError if it is not a model, or its head is not supported.
        """
        from stillhouse.teachers.backbone import check_head, require_model
        from stillhouse.teachers.local_teacher import LocalTeacher

        require_model(model, "teacher", "Teacher.load")
        check_head(model)
        return LocalTeacher(model, tokenizer)

    @staticmethod
    def stored(
        folder: str | Path, *, recorded: LocalTeacher | None = None, missing: Teacher | None = None
    ) -> StoredTeacher:
        """Open a signal store.

        recorded: for a store of hidden states, the model that was recorded, whose configuration
        and head are used. missing: a teacher that scores rows missing from the store; None: missing
        rows are an error. Raises StoreError if the store is unfinished or damaged.
        """
        from stillhouse.signals.store import open_store
        from stillhouse.teachers.stored_teacher import StoredTeacher

        config, head = (None, None) if recorded is None else (recorded.config, recorded.head)
        load = None if missing is None else lambda: missing
        return StoredTeacher(open_store(Path(folder)), config=config, head=head, load_missing=load)

    @staticmethod
    def served(
        base_url: str,
        model: str,
        tokenizer: Any,
        *,
        k: int = 32,
        key_env: str | None = None,
        concurrency: int = 16,
    ) -> ServedTeacher:
        """Connect to a server that returns log-probabilities of a prompt's tokens, such as vLLM.

        base_url: of the OpenAI-compatible API. model: its name on the server. tokenizer: of that
        model. k: most likely tokens to request at each position. key_env: the environment variable
        with the server's API key. concurrency: requests at a time.
        """
        from stillhouse.signals.signals_config import TopKSignals
        from stillhouse.teachers.served_teacher import ServedTeacher

        server = _server("Teacher.served", base_url, model, key_env, concurrency)
        kept = made(TopKSignals, {"kind": "top_k", "k": k}, "Teacher.served")
        return ServedTeacher(
            server, k=kept.k, vocabulary=token_count(tokenizer), tokenizer=tokenizer
        )

    @staticmethod
    def served_hidden(
        base_url: str,
        model: str,
        checkpoint: str | Path,
        *,
        key_env: str | None = None,
        concurrency: int = 16,
        dtype: Requested = "auto",
        trust_remote_code: bool = False,
    ) -> HiddenStateTeacher:
        """Connect to a vLLM server that runs a pooling model and returns its hidden states.

        The distributions are complete, so every divergence is exact.
        base_url, model, key_env, concurrency: as in `served`. checkpoint: the same model as a
        folder or Hub id, whose configuration, tokenizer, and head are loaded. dtype: of hidden
        states and head; auto is bfloat16 if this device supports it natively, otherwise float32.
        Raises ModelError as `resolve_model` does. EndpointError: the variable `key_env` is not set.
        """
        from stillhouse.teachers.hidden_teacher import HiddenStateServer, HiddenStateTeacher
        from stillhouse.teachers.load_model import load_config, load_tokenizer
        from stillhouse.teachers.model_source import resolve_model
        from stillhouse.teachers.shared_vocabulary import check_rows
        from stillhouse.teachers.stored_head import load_head

        server = _server("Teacher.served_hidden", base_url, model, key_env, concurrency)
        source = resolve_model(str(checkpoint), base=Path.cwd(), trusted=trust_remote_code)
        found = choose_precision(dtype).dtype
        config, tokenizer = load_config(source), load_tokenizer(source)
        head = load_head(source, dtype=found)
        text = config.get_text_config()
        states = HiddenStateServer(
            server, last=text.num_hidden_layers, width=text.hidden_size, dtype=found
        )
        return HiddenStateTeacher(
            states,
            config,
            vocabulary=check_rows(tokenizer, head.weight_VD.shape[0], "teacher"),
            tokenizer=tokenizer,
            head=head,
        )


def require_name(given: Any, otherwise: str) -> None:
    """Raise ModelError if an argument does not name a model. otherwise: what takes a model."""
    fix = f"for a model in memory: {otherwise}"
    require_type(given, (str, Path), "model", "a path or a name", fix)


def require_teacher(given: Any) -> None:
    """Raise ModelError if a function's argument is not a teacher."""
    fix = "load it first: Teacher.load(...), or Teacher.from_model(model, tokenizer)"
    require_type(given, Teacher, "teacher", "a Teacher", fix)


def _server(
    where: str, base_url: str, model: str, key_env: str | None, concurrency: int
) -> SignalServer:
    from stillhouse.signals.signals_config import SignalServer

    values = {"base_url": base_url, "model": model, "key_env": key_env, "concurrency": concurrency}
    return made(SignalServer, values, where)
