"""Fidelity of a model to its teacher on held-out text: perplexity, KL, agreement, calibration.

Shapes: N supervised rows, R windows in a batch, L tokens in a window, D hidden width, V tokens of
the shared vocabulary, B calibration bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from stillhouse.data.batches import Batch, collate, own_share, positions_of, targets_of
from stillhouse.data.shift import supervised_rows
from stillhouse.data.windows import WindowSet
from stillhouse.errors import DataError, ModelError
from stillhouse.evaluation.results import Fidelity
from stillhouse.shared_work import ALONE, Processes
from stillhouse.signals import DenseSignal, Fold, LMHead
from stillhouse.signals.lm_head import (
    folded_log_probabilities,
    kl_of_rows,
    log_probabilities,
)
from stillhouse.teachers.aligned_text import AlignedBatch
from stillhouse.teachers.backbone import float32_head, hidden_states, lm_head

T = TypeVar("T", bound="_Agreement")
BINS = 15
TOKENS_PER_FORWARD = 2048
ROWS_PER_CHUNK = 128
"""Rows whose logits are in memory at a time, in a few buffers of this many rows."""


@dataclass(frozen=True)
class HeldoutAnswers:
    """A model's outputs at all supervised positions of the held-out text.

    signal: its last hidden states, on the CPU, and its head, so that N·D numbers represent N·V
        logits.
    targets_N: the text's own next tokens.
    batches: number of rows in each batch.
    processes: if there are n of them, each has every n-th batch.
    """

    signal: DenseSignal
    targets_N: Tensor
    batches: tuple[int, ...]
    processes: Processes = ALONE

    def apart(self) -> HeldoutAnswers:
        """The answers with a head that stays valid when the model is deleted."""
        return replace(self, signal=replace(self.signal, head=self.signal.head.apart()))

    def slices(self) -> Iterator[slice]:
        """Yield the rows of each batch."""
        start = 0
        for rows in self.batches:
            yield slice(start, start + rows)
            start += rows


@torch.no_grad()
def heldout_answers(
    model: nn.Module,
    windows: WindowSet,
    *,
    advance: Callable[[int], object] = lambda tokens: None,
    head: LMHead | None = None,
    processes: Processes = ALONE,
    batches: Iterable[Batch] | None = None,
) -> HeldoutAnswers:
    """Run `model` once over all windows, in evaluation mode.

    Windows can differ in length; neighbors of equal length share a forward pass. This takes memory
    for one hidden vector per supervised token, and none for logits.

    Args:
        advance: called with the number of tokens of each pass.
        head: the model's head, if the model's own tensors are sharded.
        processes: all of them call this, and share the passes.
        batches: this process's `heldout_batches` in the model's tokens, if its tokenizer differs
            from the windows'.

    Raises:
        DataError: no position of any window is supervised.
    """
    model.eval()
    device = next(model.parameters()).device
    hidden, targets = [], []
    for batch in heldout_batches(windows, processes) if batches is None else batches:
        ids_RL, positions_RL = batch["input_ids"].to(device), batch["position_ids"].to(device)
        hidden_RLD = hidden_states(model, ids_RL, positions_RL)
        hidden.append(supervised_rows(hidden_RLD, positions_of(batch).to(device)).cpu())
        targets.append(targets_of(batch))
        advance(ids_RL.numel())
    sizes = tuple(map(len, targets))
    if not sum(sizes) and processes.count == 1:
        raise _nothing_to_predict()
    signal = DenseSignal(torch.cat(hidden), head or lm_head(model))
    return HeldoutAnswers(signal, torch.cat(targets), sizes, processes)


@torch.no_grad()
def compare(model: HeldoutAnswers, teacher: HeldoutAnswers, vocabulary: int) -> Fidelity:
    """Compare `model` with `teacher` on the same windows.

    Distributions are over the first `vocabulary` tokens, so that heads with different padding are
    comparable. Logits are computed for a few rows at a time. All softmaxes and sums are in float32
    or wider, whatever dtype the models compute in.

    If the answers come from several processes, all of them must call this. The result is for all
    windows, and identical bit for bit to that of a single process.

    Raises:
        ModelError: a head has fewer tokens than `vocabulary`, or logits are not finite.
        DataError: no label is supervised, or the text has a token outside the vocabulary.
    """
    assert torch.equal(model.targets_N, teacher.targets_N), "two models, two texts"
    _check_vocabulary(model, teacher, vocabulary)
    teacher_head = float32_head(teacher.signal.head, vocabulary)
    model_head = teacher_head if model is teacher else float32_head(model.signal.head, vocabulary)
    tallies = []
    for batch in model.slices():
        tally = _Tally()
        for start in range(batch.start, batch.stop, ROWS_PER_CHUNK):
            rows = slice(start, min(start + ROWS_PER_CHUNK, batch.stop))
            teacher_NV = _log_probabilities(teacher, rows, teacher_head)
            same = model is teacher
            model_NV = teacher_NV if same else _log_probabilities(model, rows, model_head)
            tally.add_rows(model_NV, teacher_NV, model.targets_N[rows])
        tallies.append(tally)
    return _total(model.processes, tallies, _Tally()).fidelity()


@torch.no_grad()
def compare_folded(
    model: HeldoutAnswers,
    teacher: HeldoutAnswers,
    texts: Sequence[AlignedBatch],
    fold: Fold,
) -> Fidelity:
    """Compare `model` with a teacher that has a different tokenizer, on the same text.

    KL and top-1 agreement are over shared roots, at positions where both tokenizers begin a token.
    All other metrics use the model's own tokens.

    teacher: its answers to the batches of `texts`.
    fold: the roots that both tokenizers share.

    See `compare` for processes and errors.
    """
    own = compare(model, model, len(fold.student_V))
    teacher_head = float32_head(teacher.signal.head, len(fold.teacher_W))
    model_head = float32_head(model.signal.head, len(fold.student_V))
    tallies = []
    sides = zip(model.slices(), teacher.slices(), texts, strict=True)
    for mine, theirs, text in sides:
        tally = _Agreement()
        rows_C = mine.start + text.covered_N.nonzero()[:, 0]
        other_C = theirs.start + text.begins_T
        for start in range(0, len(rows_C), ROWS_PER_CHUNK):
            chunk = slice(start, start + ROWS_PER_CHUNK)
            tally.add(
                folded_log_probabilities(
                    _log_probabilities(model, rows_C[chunk], model_head), fold.student_V, fold.roots
                ),
                folded_log_probabilities(
                    _log_probabilities(teacher, other_C[chunk], teacher_head),
                    fold.teacher_W,
                    fold.roots,
                ),
            )
        tallies.append(tally)
    found = _total(model.processes, tallies, _Agreement())
    if not found.rows:
        raise DataError(
            "the held-out text has no position where both tokenizers begin a token",
            fix="hold out more text, or text that both tokenizers can encode",
        )
    return replace(
        own,
        kl=found.kl / found.rows,
        top1_agreement=found.agreements / found.rows,
        compared=found.rows,
    )


@dataclass
class _Agreement:
    """Sums over rows, in float64."""

    rows: int = 0
    kl: float = 0.0
    agreements: int = 0

    def add(self, model_NV: Tensor, teacher_NV: Tensor) -> None:
        """Add log-probabilities of both models at the same rows, of tokens or of roots."""
        self.rows += len(model_NV)
        self.kl += float(kl_of_rows(teacher_NV, model_NV).sum(dtype=torch.float64))
        self.agreements += int((model_NV.argmax(-1) == teacher_NV.argmax(-1)).sum())

    def __add__(self, other: Self) -> Self:
        names = [each.name for each in fields(self)]
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


_NO_ROWS = partial(torch.zeros, BINS, dtype=torch.float64)


@dataclass
class _Tally(_Agreement):
    """The fields ending in _B have one value per calibration bin."""

    negative_log_likelihood: float = 0.0
    rows_B: Tensor = field(default_factory=_NO_ROWS)
    confidence_B: Tensor = field(default_factory=_NO_ROWS)
    correct_B: Tensor = field(default_factory=_NO_ROWS)

    def add_rows(self, model_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> None:
        """`add`, plus likelihood and calibration. targets_N: the text's own tokens."""
        self.add(model_NV, teacher_NV)
        targets_N = targets_N.to(model_NV.device)
        confidence_N, choice_N = model_NV.max(-1)
        self.negative_log_likelihood -= float(
            model_NV.gather(-1, targets_N[:, None]).sum(dtype=torch.float64)
        )
        confidence_N = confidence_N.exp().cpu().double()
        correct_N = (choice_N == targets_N).cpu().double()
        bin_N = (confidence_N * BINS).ceil().long().clamp(1, BINS) - 1  # Bin b is (b/B, (b+1)/B].
        self.rows_B.index_add_(0, bin_N, torch.ones_like(confidence_N))
        self.confidence_B.index_add_(0, bin_N, confidence_N)
        self.correct_B.index_add_(0, bin_N, correct_N)

    def fidelity(self) -> Fidelity:
        if not self.rows:
            raise _nothing_to_predict()
        mean_nll = torch.tensor(self.negative_log_likelihood / self.rows, dtype=torch.float64)
        if not (torch.isfinite(mean_nll) and torch.isfinite(torch.tensor(self.kl))):
            raise ModelError(
                "a model's logits on the held-out text are not finite",
                fix="evaluate in float32; if that does not help, check the checkpoint's weights",
            )
        gaps_B = (self.confidence_B - self.correct_B).abs()
        return Fidelity(
            perplexity=float(mean_nll.exp()),
            kl=self.kl / self.rows,
            top1_agreement=self.agreements / self.rows,
            calibration_error=float(gaps_B.sum()) / self.rows,
            tokens=self.rows,
        )


def _total(processes: Processes, tallies: list[T], start: T) -> T:
    """The sum of all processes' tallies (one per batch), in the order of the batches."""
    of_processes = processes.collect(tallies)
    return sum((tally for together in zip(*of_processes, strict=True) for tally in together), start)


def _nothing_to_predict() -> DataError:
    return DataError(
        "the held-out text has no token to predict: every label is masked",
        fix="add held-out text, or raise data.heldout_tokens",
    )


def _log_probabilities(answers: HeldoutAnswers, rows: slice | Tensor, head: LMHead) -> Tensor:
    return log_probabilities(head, answers.signal.hidden_ND[rows].to(head.weight_VD.device))


def _check_vocabulary(model: HeldoutAnswers, teacher: HeldoutAnswers, vocabulary: int) -> None:
    narrow = min(len(answers.signal.head.weight_VD) for answers in (model, teacher))
    if narrow < vocabulary:
        raise ModelError(
            f"a model predicts {narrow:,} tokens, but the vocabulary has {vocabulary:,}",
            fix="use the teacher's tokenizer, so that teacher and student have the same token ids",
        )
    largest = max(model.targets_N.tolist(), default=0)
    if largest >= vocabulary:
        raise DataError(
            f"the held-out text has token {largest}, but the vocabulary ends at {vocabulary - 1}",
            fix="tokenize the held-out text with the teacher's tokenizer",
        )


def heldout_batches(windows: WindowSet, processes: Processes = ALONE) -> Iterator[Batch]:
    """This process's batches, one per forward pass."""
    return map(collate, own_share(_batches(windows), processes.own, processes.count))


def _batches(windows: WindowSet) -> Iterator[list[Batch]]:
    """Group neighboring windows of equal length, up to TOKENS_PER_FORWARD tokens."""
    batch: list[Batch] = []
    for window in (windows[index] for index in range(len(windows))):
        length = len(window["input_ids"])
        full = (len(batch) + 1) * length > TOKENS_PER_FORWARD
        if batch and (full or len(batch[0]["input_ids"]) != length):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
