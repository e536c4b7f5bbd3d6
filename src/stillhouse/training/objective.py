"""The terms of an objective, built for two models of known shapes, and the layers they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stillhouse.attention_heads import head_size, key_value_heads
from stillhouse.errors import RecipeError, SignalError
from stillhouse.objectives import HiddenStateLoss, LayerMap, Mixture, Schedule, Term, map_layers
from stillhouse.objectives.objective_config import (
    AttentionRelationsTerm,
    ChunksTerm,
    HiddenStatesTerm,
    LayerTerm,
    LogitsTerm,
    ObjectiveRecipe,
    ObjectiveTerm,
)
from stillhouse.objectives.objective_names import ChunkDistance
from stillhouse.objectives.terms import name_among
from stillhouse.section import made, require_type
from stillhouse.teachers.activations import ActivationRequest
from stillhouse.teachers.teacher import TeacherNeeds


@dataclass(frozen=True)
class Weight:
    """A term's weight and its schedule."""

    value: float
    schedule: Schedule | None

    def at(self, progress: float) -> float:
        return self.value * (1.0 if self.schedule is None else self.schedule.at(progress))


@dataclass(frozen=True)
class LayerLogits:
    """A divergence on the student's intermediate layers, through its own final norm and head.

    name: distinguishes it from other divergences on intermediate layers.
    """

    term: Mixture
    layers: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class HiddenStates:
    weight: Weight
    loss: HiddenStateLoss
    name: str


@dataclass(frozen=True)
class Relations:
    weight: Weight
    pairs: LayerMap
    heads: int
    relations: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class ChunkLikelihoods:
    weight: Weight
    distance: ChunkDistance


@dataclass(frozen=True)
class Objective:
    """The terms of an objective, built for two models of known shapes."""

    output: Mixture
    layer_logits: tuple[LayerLogits, ...] = ()
    hidden: tuple[HiddenStates, ...] = ()
    relations: tuple[Relations, ...] = ()
    chunks: tuple[ChunkLikelihoods, ...] = ()

    @property
    def student_request(self) -> ActivationRequest:
        layers = {layer for term in self.layer_logits for layer in term.layers}
        layers |= {student for term in self.hidden for student, _ in term.loss.pairs}
        attention = {student for term in self.relations for student, _ in term.pairs}
        return ActivationRequest(frozenset(layers), frozenset(attention))

    @property
    def needs(self) -> TeacherNeeds:
        """The signals and activations that the objective needs from the teacher."""
        layers = {teacher for term in self.hidden for _, teacher in term.loss.pairs}
        attention = {teacher for term in self.relations for _, teacher in term.pairs}
        request = ActivationRequest(frozenset(layers), frozenset(attention))
        return TeacherNeeds(tuple(self.divergences), request, chunks=bool(self.chunks))

    @property
    def divergences(self) -> list[Term]:
        """All divergences at the output and at intermediate layers."""
        mixtures = [self.output, *(logits.term for logits in self.layer_logits)]
        return [term for mixture in mixtures for term, _ in mixture.terms]

    def projections(self) -> nn.ModuleList:
        """The learned projections, which are trained with the student but are not part of it."""
        return nn.ModuleList(term.loss for term in self.hidden if len(term.loss.projections))


# --- from the recipe -------------------------------------------------------------------------


def objective_for(
    objective: Objective | ObjectiveRecipe | Sequence[ObjectiveTerm] | None,
    student_config: Any,
    teacher_config: Any | None,
    *,
    seed: int = 0,
) -> Objective:
    """Build an objective from a recipe's section, a list of terms, or None (forward KL alone).

    An `Objective` is returned as it is. teacher_config: None if it is unknown. seed: for learned
    projections. Raises SignalError, with the term's place, for terms that these two models do not
    support.
    """
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, ObjectiveRecipe):
        objective = terms_of(objective)
    student = student_config.get_text_config()
    teacher = (teacher_config or student_config).get_text_config()
    output: list[tuple[Term, Schedule | None]] = []
    inside: list[tuple[Term, Schedule | None, tuple[int, ...]]] = []
    hidden: list[HiddenStates] = []
    relations: list[Relations] = []
    chunks: list[ChunkLikelihoods] = []
    for place, term in enumerate(objective.terms):
        given = term.schedule
        schedule = None if given is None else Schedule(**given.model_dump())
        weight = Weight(term.weight, schedule)
        try:
            if isinstance(term, HiddenStatesTerm):
                loss = _hidden_loss(term, student, teacher, seed + place)
                hidden.append(HiddenStates(weight, loss, f"hidden {term.distance}"))
            elif isinstance(term, AttentionRelationsTerm):
                relations.append(_relations(term, student, teacher, weight))
            elif isinstance(term, ChunksTerm):
                chunks.append(ChunkLikelihoods(weight, term.distance))
            elif term.layers is None:
                output.append((_term(term), schedule))
            else:
                layers = _own_layers(term.layers, student.num_hidden_layers)
                inside.append((_term(term), schedule, layers))
        except SignalError as error:
            where = f"objective.terms.{place}"
            raise SignalError(error.what, where=where, fix=error.fix) from None
    names = [h.name for h in hidden] + [r.name for r in relations] + [c.distance for c in chunks]
    if len(set(names)) < len(names):
        raise SignalError(
            "two terms on intermediate layers or on chunks have the same kind",
            where="objective.terms",
            fix="merge them into one term with all pairs, or with the sum of the weights",
        )
    terms_inside = [term for term, _, _ in inside]
    layer_logits = tuple(
        LayerLogits(Mixture(((term, schedule),)), layers, name_among(terms_inside, term))
        for term, schedule, layers in inside
    )
    mixture = Mixture(tuple(output))
    return Objective(mixture, layer_logits, tuple(hidden), tuple(relations), tuple(chunks))


def terms_of(objective: Sequence[ObjectiveTerm] | None) -> ObjectiveRecipe:
    """The section of these terms; of none, KL alone. Raises RecipeError for what is not a term."""
    if not objective:
        return ObjectiveRecipe()
    fix = "give a list: objective=[KL()]"
    require_type(objective, (list, tuple), "objective", "a list of terms", fix, RecipeError)
    return made(ObjectiveRecipe, {"terms": list(objective)}, "objective")


def _term(term: LogitsTerm) -> Term:
    parameters = {name: getattr(term, name) for name in ("alpha", "beta", "mu")}
    return Term(term.divergence, term.weight, term.temperature, term.t_squared, **parameters)


def _own_layers(layers: list[int], blocks: int) -> tuple[int, ...]:
    for layer in layers:
        if not 1 <= layer < blocks:
            last = "for the last block, use a term without `layers`"
            raise SignalError(
                f"a term compares logits of layer {layer}, but the student has {blocks} blocks",
                fix=f"choose layers from 1 to {blocks - 1}; {last}" if blocks > 1 else last,
            )
    return tuple(sorted(set(layers)))


def _pairs(term: LayerTerm, student: Any, teacher: Any, *, embeddings: bool) -> LayerMap:
    given = term.pairs
    if given is not None and not embeddings and any(0 in pair for pair in given):
        more = ", or set embeddings: true" if isinstance(term, HiddenStatesTerm) else ""
        raise SignalError("a pair contains block 0", fix=f"number blocks from 1{more}")
    if given is not None and embeddings and (0, 0) not in given:
        given = [(0, 0), *given]
    return map_layers(
        student.num_hidden_layers,
        teacher.num_hidden_layers,
        term.layers if given is None else given,
        count=term.count,
        embeddings=embeddings,
    )


def _hidden_loss(term: HiddenStatesTerm, student: Any, teacher: Any, seed: int) -> HiddenStateLoss:
    pairs = _pairs(term, student, teacher, embeddings=term.embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HiddenStateLoss(pairs, student.hidden_size, teacher.hidden_size, term.distance)


def _relations(
    term: AttentionRelationsTerm, student: Any, teacher: Any, weight: Weight
) -> Relations:
    pairs = _pairs(term, student, teacher, embeddings=False)
    for name, config in (("student", student), ("teacher", teacher)):
        head, groups = head_size(config), key_value_heads(config)
        for relation in term.relations:
            width = head * (config.num_attention_heads if relation == "query" else groups)
            if width % term.heads:
                raise SignalError(
                    f"the {name}'s {relation} width of {width} is not a multiple of {term.heads} "
                    "relation heads",
                    fix="choose a number of heads that divides the widths of both models",
                )
    return Relations(weight, pairs, term.heads, tuple(term.relations), "attention relations")


def stored_layers(objective: Objective, teacher_config: Any) -> tuple[int, ...]:
    """The teacher's layers that a store of hidden states must contain for these terms.

    Raises SignalError: no term needs any.
    """
    layers = set(objective.needs.activations.layers)
    if any(term.needs_teacher for term in objective.divergences):
        layers.add(teacher_config.get_text_config().num_hidden_layers)
    if not layers:
        raise SignalError(
            "no term needs the teacher's hidden states",
            where="objective.terms",
            fix="remove `signals`, or add a term with a teacher",
        )
    return tuple(sorted(layers))
