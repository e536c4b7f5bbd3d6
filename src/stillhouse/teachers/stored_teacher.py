"""A teacher whose signals were recorded in a store, with a fallback for missing rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.data.batches import Batch, Batches, in_order
from stillhouse.data.windows import WindowSet
from stillhouse.errors import SignalError
from stillhouse.progress import note
from stillhouse.signals import DenseSignal, HiddenSignal, LMHead, SampledSignal, SparseSignal
from stillhouse.signals.encoded_rows import Rows
from stillhouse.signals.encodings import AnswerChunks, Encoding, FrozenHead, Hidden
from stillhouse.signals.folded_store import ROOTS, fold_sha256, read_fold, unfolded_rows
from stillhouse.signals.manifest import check_expected
from stillhouse.signals.record import Recorder
from stillhouse.signals.segments import Segments
from stillhouse.signals.signal_types import moved_rows
from stillhouse.signals.store import Store
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.record_store import encoded_answer, recorder_of, segments_of
from stillhouse.teachers.shared_vocabulary import tokenizer_identity
from stillhouse.teachers.stored_head import head_sha256
from stillhouse.teachers.teacher import OUTPUT_ONLY, Teacher, TeacherNeeds, TeacherView


class StoredTeacher(Teacher):
    """Reads a batch's signals from a store.

    config, head: of the recorded model, for a store of hidden states; the head turns those of the
    last layer into full distributions. load_missing: loads the teacher that scores rows missing
    from the store; called at most once, if there are any. None: missing rows are an error.
    """

    def __init__(
        self,
        store: Store,
        *,
        config: Any = None,
        head: LMHead | None = None,
        load_missing: Callable[[], Teacher] | None = None,
    ) -> None:
        self.store = store
        self._fold = read_fold(store.path, store.settings)
        self.vocabulary = (
            store.settings.vocabulary if self._fold is None else len(self._fold.student_V)
        )
        self.gives_chunks = isinstance(store.settings.encoding, AnswerChunks)
        self.full_distributions = not self.gives_chunks
        self.described = f"{store.settings.encoding.kind} signals in {store.path}"
        self.fingerprint = store.manifest.digest()
        self.config, self._head = config, head
        self._last = -1 if config is None else int(config.get_text_config().num_hidden_layers)
        self._load_missing = load_missing
        self._missing: Teacher | None = None
        self._missing_share = 0.0
        self._student_head: LMHead | None = None
        self._recorder: Recorder | None = None

    def answer(self, batch: Batch, request: ActivationRequest = OUTPUT_ONLY) -> TeacherView:
        segments = segments_of(batch)
        missing_S = self.store.missing(segments)
        stored = self.store.read(segments, self._missing_rows(batch, segments, missing_S))
        device = self._device or batch["labels"].device
        if self._fold is not None:
            assert isinstance(stored, SparseSignal | SampledSignal)
            self._fold = self._fold.to(device)
            moved = moved_rows(stored, device, non_blocking=True)
            return TeacherView((unfolded_rows(moved, self._fold),))
        if not isinstance(stored, HiddenSignal):
            return TeacherView((moved_rows(stored, device, non_blocking=True),))
        layers = {
            layer: hidden_ND.to(device, non_blocking=True)
            for layer, hidden_ND in stored.hidden_ND.items()
        }
        last = layers.get(self._last)
        if last is None or self._head is None:
            return TeacherView((), layers)
        return TeacherView((DenseSignal(last, self._head),), layers)

    def _missing_rows(
        self, batch: Batch, segments: Segments, missing_S: NDArray[np.bool_]
    ) -> Rows | None:
        if not missing_S.any():
            if self._missing is not None and self._missing.collective:
                self._missing.answer(batch)  # other processes may need its answer
            return None
        teacher = self._teacher_of_missing()
        if teacher is None:
            return None
        if self._recorder is None:
            self._recorder = recorder_of(self.store.settings, self._student_head)
        return encoded_answer(teacher, self._recorder, batch, segments, missing_S)[0]

    def _teacher_of_missing(self) -> Teacher | None:
        if self._missing is None and self._load_missing is not None:
            self._missing = self._load_missing()
            self.tokenizer = self._missing.tokenizer
            if self._fold is not None and isinstance(self._missing, AlignedTeacher):
                self._check_roots(self._missing)
        return self._missing

    def _check_roots(self, teacher: AlignedTeacher) -> None:
        """Raise SignalError if the teacher's roots differ from the store's."""
        if fold_sha256(teacher.roots.fold) != self.store.settings.identity[ROOTS]:
            raise SignalError(
                "the store's roots differ from this text's, so the teacher cannot score rows "
                "that the store lacks",
                where=self.store.path,
                fix="record a store of this text, by removing signals.store",
            )

    def prepare(self, needs: TeacherNeeds, text: Batches | None = None) -> None:
        self._check_needs(needs)
        lacking = 0 if text is None else lacking_tokens(self.store, text)
        if text is None or not lacking:
            return
        what = f"the store lacks {lacking:,} of {text.supervised_tokens:,} training tokens"
        teacher = self._teacher_of_missing()
        if teacher is None:
            raise SignalError(
                what,
                where=self.store.path,
                fix="record a store of this data, since this one was recorded on different text or "
                "with a different chat template; or set signals.missing: live to let the teacher "
                "score the missing tokens",
            )
        note(f"{what}; the teacher scores them live")
        teacher.prepare(needs, text)
        self._missing_share = lacking / text.supervised_tokens

    def _check_needs(self, needs: TeacherNeeds) -> None:
        settings, path = self.store.settings, self.store.path
        temperature = recorded_temperature(settings.encoding, needs)
        identity = {}
        if needs.tokenizer is not None:
            identity["tokenizer"] = tokenizer_identity(needs.tokenizer)["tokenizer"]
        if isinstance(settings.encoding, FrozenHead):
            check_head_frozen(needs.frozen_head is not None, path)
            assert needs.frozen_head is not None
            identity["head"] = head_sha256(needs.frozen_head)
            self._student_head = needs.frozen_head
        if isinstance(settings.encoding, Hidden):
            check_layers(settings.encoding, needs.activations.layers, path)
        named = {key: value for key, value in identity.items() if key in settings.identity}
        check_expected(settings, path, named, temperature, None)

    def place(self, device: torch.device, context: int) -> None:
        super().place(device, context)
        self._head = None if self._head is None else self._head.to(device)
        if self._missing is not None:
            self._missing.place(device, context)

    def for_heldout(self, batches: Sequence[Batch]) -> Teacher | None:
        if self._missing is not None:
            return self._missing.for_heldout(batches)
        settings = self.store.settings
        if self.gives_chunks:
            return None
        if isinstance(settings.encoding, Hidden) and (
            self._head is None or self._last not in settings.encoding.layers
        ):
            return None
        covered = all(self.store.covers(segments_of(batch)) for batch in batches)
        return self if covered and settings.temperature == 1.0 else None

    def for_own_text(self) -> Teacher:
        teacher = self._teacher_of_missing()
        if teacher is None:
            raise SignalError(
                "a store of signals cannot score text that the student generates during training",
                where=self.store.path,
                fix="set signals.missing: live to let the teacher itself score it, or remove "
                "`signals` or train.on_policy",
            )
        return teacher.for_own_text()

    def flops(self, tokens: int) -> int:
        if self._missing is None:
            return 0
        return self._missing.flops(round(self._missing_share * tokens))

    def __repr__(self) -> str:
        rows = self.store.manifest.rows
        return f"StoredTeacher({self.described}: {rows:,} tokens of {self.vocabulary:,})"


def recorded_temperature(encoding: Encoding, needs: TeacherNeeds) -> float:
    """The temperature at which a store with this encoding must be recorded.

    Raises SignalError: a term that the encoding does not support, or terms at several temperatures.
    """
    where, activations = "objective.terms", needs.activations
    if activations.attention or (activations.layers and not isinstance(encoding, Hidden)):
        raise SignalError(
            f"a term needs the teacher's intermediate layers, but signals of kind "
            f"{encoding.kind} support only {encoding.serves}",
            where=where,
            fix="use signals of kind hidden (which support all terms except attention relations), "
            "or a live teacher (no `signals`)",
        )
    if isinstance(encoding, Hidden):
        return 1.0  # no softmax was applied yet
    of_teacher = [term for term in needs.terms if term.needs_teacher]
    if of_teacher and isinstance(encoding, AnswerChunks):
        raise SignalError(
            f"{of_teacher[0].divergence} compares distributions, but with a term on chunks, "
            "signals.answers provides only likelihoods of chunks",
            where=where,
            fix="use only terms on chunks and cross_entropy (for an API with a different "
            "tokenizer), or remove the term on chunks",
        )
    for term in of_teacher:
        name = term.divergence
        only_forward = encoding.signal in ("SampledSignal", "FrozenHeadSignal")
        if (only_forward and name != "forward_kl") or name == "adaptive_kl":
            raise SignalError(
                f"{name} cannot be computed from signals of kind {encoding.kind}, which support "
                f"only {encoding.serves}",
                where=where,
                fix="use signals of kind top_k or hidden, or forward_kl, or a live teacher",
            )
    temperatures = sorted({term.temperature for term in of_teacher}) or [1.0]
    if len(temperatures) > 1:
        raise SignalError(
            f"the terms have temperatures {', '.join(f'{t:g}' for t in temperatures)}, but a store "
            "is recorded at a single one",
            where=where,
            fix="use one temperature, or a live teacher (no `signals`)",
        )
    return temperatures[0]


def check_layers(encoding: Hidden, needed: Iterable[int], where: Path) -> None:
    """Raise SignalError if a store of hidden states lacks some of the layers."""
    lacking = sorted(set(needed) - set(encoding.layers))
    if lacking:
        raise SignalError(
            f"the store has the teacher's layers {list(encoding.layers)}, but the objective also "
            f"needs {lacking}",
            where=where,
            fix="use terms on the stored layers, or record a store for these terms",
        )


def check_head_frozen(frozen: bool, where: str | Path) -> None:
    """Raise SignalError if signals for a frozen head are used while the head is trained."""
    if not frozen:
        raise SignalError(
            "signals of kind frozen_head require that the student's head is not trained",
            where=where,
            fix="set train.freeze_head: true, or use signals of a different kind",
        )


def lacking_tokens(store: Store, text: WindowSet) -> int:
    """The number of supervised tokens of the text that have no row in the store."""
    lacking = 0
    for batch in in_order(text, Teacher.tokens_together):
        segments = segments_of(batch)
        lacking += int(segments.rows_S[store.missing(segments)].sum())
    return lacking
