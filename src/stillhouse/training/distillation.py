"""The module that is trained: a student with its objective, whose forward returns the loss.

Shapes: R windows, L tokens, N supervised rows, D hidden width.

The student inside stays a plain transformers model with its own forward, so it can generate during
training. DDP and FSDP wrap the module around it, so their hooks fire around everything that uses
its parameters, including the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.data.batches import Batch, documents_of, positions_of, targets_of
from stillhouse.data.shift import supervised_rows
from stillhouse.launch import leads
from stillhouse.objectives import LossSum, chunk_loss, fused_loss, layer_logits_loss, relation_loss
from stillhouse.objectives.chunks import no_chunks
from stillhouse.objectives.objective_config import ObjectiveRecipe, ObjectiveTerm
from stillhouse.pruning.offload import has_large_weights
from stillhouse.recomputed import recomputed
from stillhouse.signals import ChunkSignal, DenseSignal, FoldedSignal, SampledSignal, Signal
from stillhouse.signals.signal_types import inner_signal
from stillhouse.students.student import Student
from stillhouse.teachers.activations import ActivationRequest, Activations, final_norm, run_backbone
from stillhouse.teachers.backbone import checkpoints_layers, lm_head
from stillhouse.teachers.model_source import AnyModel
from stillhouse.teachers.teacher import Teacher, TeacherView, require_teacher
from stillhouse.teachers.write_by_layer import weights_by_layer, write_by_layer
from stillhouse.training.measures import measure_rows
from stillhouse.training.objective import Objective, objective_for
from stillhouse.training.sharded_checkpoint import gathered_weights, read_weights

PROJECTIONS = "distillation_projections.safetensors"
STUDENT = "student."
"""Prefix of the student's parameter names in the module."""
NO_TEACHER = TeacherView()


class Distillation(nn.Module):
    """A student, its objective, and the objective's learned projections.

    student: a Student or a transformers model; the attribute `student` is the model. objective:
    anything that `objective_for` accepts. teacher: defines the shapes of terms on intermediate
    layers, and the shared vocabulary; rows of heads beyond it are padding.
    seed: for the projections.
    Raises SignalError: terms that these two models do not support.
    """

    def __init__(
        self,
        student: Student | Any,
        objective: Objective | ObjectiveRecipe | Sequence[ObjectiveTerm] | None = None,
        teacher: Teacher | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = student if isinstance(student, Student) else Student(student)
        self.student = given.model
        if teacher is not None:
            require_teacher(teacher)
        config = None if teacher is None else teacher.config
        self.objective = objective_for(objective, self.student.config, config, seed=seed)
        self.vocabulary = min(each.vocabulary for each in (given, teacher) if each is not None)
        # Parameters of this module, so that optimizer, wrappers, and checkpoints all see them.
        # They have the student's dtype, since FSDP2 shards weights of the same dtype together.
        self.projections = self.objective.projections().to(next(self.student.parameters()).dtype)
        # Attributes that FSDP and transformers.Trainer expect from a loaded model.
        self._no_split_modules = getattr(self.student, "_no_split_modules", None)
        self._keys_to_ignore_on_save = getattr(self.student, "_keys_to_ignore_on_save", None)

    @property
    def is_narrow(self) -> bool:
        """Whether weights and gradients are bfloat16."""
        return next(self.student.parameters()).dtype == torch.bfloat16

    @property
    def request(self) -> ActivationRequest:
        """The teacher's activations that the terms need, for `Teacher.answer`."""
        return self.objective.needs.activations

    def forward(
        self,
        batch: Batch,
        view: TeacherView | None = None,
        progress: float = 0.0,
        objective: Objective | None = None,
        measure: bool = False,
    ) -> LossSum:
        """Compute the weighted sum of the terms over the batch's supervised rows.

        view: the teacher's outputs, with the activations of `request`; None if no term needs
        a teacher. With several signals, the loss is the mean of the losses for each.
        progress: fraction of all steps that are done. objective: used instead of the module's own.
        measure: add the values of `measure_rows` to the terms, if all signals are full
        distributions.
        """
        objective, view = objective or self.objective, view or NO_TEACHER
        ids_RL = batch["input_ids"]
        # On a GPU, the extra calls would take longer than the operations.
        little = ids_RL.device.type == "cpu" and not checkpoints_layers(self.student)
        with recomputed() if little else nullcontext():
            found = run_backbone(
                self.student,
                ids_RL,
                batch["position_ids"],
                objective.student_request,
                documents_of(batch),
            )
        signals: Sequence[Signal | ChunkSignal | None] = view.signals or (None,)
        measure = measure and all(isinstance(inner_signal(s), DenseSignal) for s in signals)
        under = [
            [
                # Estimated measures come first, so that exact sums of terms replace them.
                *([self._measures(found, signal, batch)] if measure else ()),
                *self._losses_under(signal, objective, found, batch, progress),
            ]
            for signal in signals
        ]
        shared = list(_activation_losses(objective, found, view, batch, progress))
        return _mean(
            [_sum([*own, *shared], signal) for own, signal in zip(under, signals, strict=True)]
        )

    def _losses_under(
        self,
        signal: Signal | ChunkSignal | None,
        objective: Objective,
        found: Activations,
        batch: Batch,
        progress: float,
    ) -> Iterator[LossSum]:
        """Yield the losses that use this signal and the head: divergences at the output and at
        intermediate layers, and distances between likelihoods of chunks."""
        positions_N, targets_N = positions_of(batch), targets_of(batch)
        head, vocabulary = lm_head(self.student), self.vocabulary
        common: dict[str, Any] = {
            "signal": None if isinstance(signal, ChunkSignal) else signal,
            "targets_N": targets_N,
            "vocab_size": vocabulary,
        }
        if objective.output.terms:
            rows_ND = supervised_rows(found.last_RLD, positions_N)
            yield fused_loss(rows_ND, head, objective.output.at(progress), **common)
        for logits in objective.layer_logits:
            layers = {i: supervised_rows(found.layers[i], positions_N) for i in logits.layers}
            norm = final_norm(self.student)
            loss = layer_logits_loss(layers, norm, head, logits.term.at(progress), **common)
            names = [f"{logits.name}@layer{layer}" for layer in logits.layers]
            yield replace(loss, terms=dict(zip(names, loss.terms.values(), strict=True)))
        if not objective.chunks:
            return
        hidden_ND = supervised_rows(found.last_RLD, positions_N)
        chunks = signal.chunks if isinstance(signal, FoldedSignal) else signal
        if not isinstance(chunks, ChunkSignal):
            chunks = no_chunks(hidden_ND.device)
        for each in objective.chunks:
            yield chunk_loss(
                hidden_ND,
                head,
                chunks,
                targets_N,
                distance=each.distance,
                weight=each.weight.at(progress),
                vocab_size=vocabulary,
            )

    def _measures(
        self, found: Activations, signal: Signal | ChunkSignal | None, batch: Batch
    ) -> LossSum:
        hidden_ND = supervised_rows(found.last_RLD, positions_of(batch))
        head = lm_head(self.student)
        return measure_rows(hidden_ND, head, signal, targets_of(batch), self.vocabulary)

    # --- attributes that transformers.Trainer and accelerate use --------------------------------

    @property
    def config(self) -> Any:
        return self.student.config

    def tie_weights(self) -> None:
        self.student.tie_weights()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.student.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.student.gradient_checkpointing_enable(**options)

    # --- checkpoints ----------------------------------------------------------------------------

    def save_student(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the student as a plain Hugging Face folder.

        state: all parameters, by their names in this module; None: this process's parameters.
        """
        if state is not None:
            state = {n.removeprefix(STUDENT): v for n, v in state.items() if n.startswith(STUDENT)}
        self.student.save_pretrained(folder, state_dict=state)

    def save_sharded_student(self, folder: Path) -> None:
        """Like `save_student`, for sharded weights, which are gathered and written a layer at a
        time if the model is large. Every process must call this; the main process writes."""
        student = self.student
        parts = [names for _, names in weights_by_layer(student)]
        large = has_large_weights(student)
        weights = gathered_weights(student, parts if large else [set().union(*parts)])
        if not leads():
            for _ in weights:
                pass
        elif large:
            folder.mkdir(parents=True, exist_ok=True)
            write_by_layer(student, folder, weights)
        else:
            student.save_pretrained(folder, state_dict=next(weights))

    def read_student(self, checkpoint: AnyModel) -> None:
        """Set the sharded student's weights from a model folder. Every process must call this.

        Raises ModelError as `read_weights` does.
        """
        read_weights(self, self.student, checkpoint)

    def save_projections(self, folder: Path) -> None:
        """Write the learned projections, if there are any."""
        if len(self.projections):
            save_file(self.projections.state_dict(), folder / PROJECTIONS)

    def load_projections(self, folder: Path) -> None:
        """Load the projections that `save_projections` wrote, if there are any."""
        if len(self.projections):
            self.projections.load_state_dict(load_file(folder / PROJECTIONS))

    def read_projections(self, folder: Path) -> dict[str, Tensor]:
        """Read the projections that `save_projections` wrote, by this module's parameter names."""
        if not len(self.projections):
            return {}
        return {f"projections.{n}": value for n, value in load_file(folder / PROJECTIONS).items()}


def _sum(parts: Sequence[LossSum], signal: Signal | ChunkSignal | None) -> LossSum:
    """Add up the parts of one batch's loss for one signal."""
    values = {name: value for part in parts for name, value in part.terms.items()}
    if isinstance(inner_signal(signal), SampledSignal):
        # Samples lack the teacher's entropy, so the result is not a divergence.
        values = {n.replace("forward_kl", "teacher_cross_entropy"): v for n, v in values.items()}
    total = torch.stack([part.total.float() for part in parts]).sum()
    return LossSum(total, values, parts[0].rows)


def _mean(losses: Sequence[LossSum]) -> LossSum:
    """Average one batch's losses for several signals.

    A term that only some losses have, such as the cross-entropy of samples, is averaged over these.
    """
    if len(losses) == 1:
        return losses[0]
    found: dict[str, list[Tensor]] = {}
    for loss in losses:
        for name, value in loss.terms.items():
            found.setdefault(name, []).append(value)
    terms = {name: torch.stack(values).mean(0) for name, values in found.items()}
    total = torch.stack([loss.total for loss in losses]).mean()
    return LossSum(total, terms, losses[0].rows)


def _activation_losses(
    objective: Objective, student: Activations, teacher: TeacherView, batch: Batch, progress: float
) -> Iterator[LossSum]:
    """Yield the weighted losses of terms on hidden states and on attention relations."""
    positions_N = positions_of(batch)
    count = len(positions_N)
    for hidden in objective.hidden:
        pairs = hidden.loss.pairs
        rows = {i: supervised_rows(student.layers[i], positions_N) for i, _ in pairs}
        total = hidden.loss(rows, teacher.layers).total
        yield _weighted(hidden.name, hidden.weight.at(progress), total, count)
    if objective.relations:
        mask_RLL = same_document(batch["position_ids"])
    for term in objective.relations:
        totals = [
            relation_loss(
                student.attention[i],
                teacher.attention[j],
                heads=term.heads,
                mask_RLL=mask_RLL,
                positions_N=positions_N,
                relations=term.relations,
            ).total
            for i, j in term.pairs
        ]
        total = torch.stack(totals).mean()
        yield _weighted(term.name, term.weight.at(progress), total, count)


def _weighted(name: str, weight: float, total: Tensor, rows: int) -> LossSum:
    return LossSum(total * weight, {name: total.detach()}, rows)


def same_document(position_ids_RL: Tensor) -> Tensor:
    """Causal mask within documents, [R, L, L]: True where position i can attend to position j."""
    document_RL = (position_ids_RL == 0).cumsum(-1)
    same_RLL = document_RL[:, :, None] == document_RL[:, None, :]
    return same_RLL.tril()
