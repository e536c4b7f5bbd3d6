"""The arithmetic of a run works with the smallest and largest numbers that a recipe may have."""

from __future__ import annotations

import itertools
import random
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from transformers import get_scheduler

from stillhouse import field_types
from stillhouse.classify.classify_config import AbstainRecipe, RandomClassifier
from stillhouse.errors import RecipeError, SignalError
from stillhouse.evaluation.classification import choose_threshold
from stillhouse.field_types import (
    Beta,
    Divergence,
    Epochs,
    GradientNorm,
    LearningRate,
    PartialShare,
    PartialShareOrZero,
    SamplingTemperature,
    Seed,
    Share,
    Similarity,
    Temperature,
    Usd,
    Weight,
    WeightDecay,
)
from stillhouse.generation.budget import Budget, Price, Spending
from stillhouse.generation.sampling import next_tokens
from stillhouse.language_model.job import within_vocabulary
from stillhouse.objectives.fused import fused_loss
from stillhouse.objectives.objective_config import LogitsTerm
from stillhouse.objectives.objective_names import PARAMETERS
from stillhouse.objectives.terms import Schedule
from stillhouse.section import checked
from stillhouse.signals import LMHead, LogitsSignal
from stillhouse.signals.encodings import Stratified, TopK, TopP
from stillhouse.students.random_student import overridden_config
from stillhouse.synthesis.near_duplicates import NearDuplicates
from stillhouse.training.objective import _term
from stillhouse.training.train import plan_batches
from stillhouse.training.train_config import SCHEDULES, TrainRecipe
from tests import tiny


def ends(kind: Any) -> list[Any]:
    """The smallest and the largest value of a type of `field_types`, and its smallest above 0."""
    schema = TypeAdapter(kind).json_schema()
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum")
    if high is None:
        high = float(np.nextafter(schema["exclusiveMaximum"], -1))
    found = [low, high]
    if low == 0 and schema["type"] == "number":
        found += [least for least in (10.0**-power for power in range(16)) if usable(kind, least)][
            -1:
        ]
    return [value for value in found if usable(kind, value)]


def usable(kind: Any, value: Any) -> bool:
    try:
        checked(kind, value, "it")
    except RecipeError:
        return False
    return True


def test_every_number_type_has_two_bounds() -> None:
    kinds = [
        value
        for value in vars(field_types).values()
        if get_args(value) and get_args(value)[0] in (int, float)
    ]
    assert len(kinds) > 20
    for kind in kinds:
        assert len(ends(kind)) >= 2


@pytest.mark.parametrize("seed", ends(Seed))
def test_every_random_number_generator_accepts_the_seeds(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        transformers.set_seed(seed)
        torch.manual_seed(seed + 1000)  # the seed of a later prompt or term
    np.random.default_rng(seed)
    random.Random(seed)
    transformers.set_seed(0)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 1.5, True, "1"])
def test_other_seeds_are_rejected_with_the_key(seed: Any) -> None:
    with pytest.raises(RecipeError, match="seed: input should be"):
        checked(Seed, seed, "seed")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_optimizer_and_schedule_stay_finite(schedule: str) -> None:
    kinds = (LearningRate, WeightDecay, Beta, PartialShareOrZero, GradientNorm)
    for rate, decay, beta, warmup, norm in itertools.product(*map(ends, kinds)):
        section = TrainRecipe(
            learning_rate=rate, weight_decay=decay, betas=(beta, beta), warmup=warmup,
            max_grad_norm=norm, schedule=schedule, decay=1e-6,
        )  # fmt: skip
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW(
            [weight], lr=rate, weight_decay=decay, betas=section.betas, fused=True
        )
        options = {"num_decay_steps": 1} if schedule == "wsd" else {}
        scheduler = get_scheduler(
            SCHEDULES[schedule], optimizer, round(section.warmup * 4), 4, options
        )
        for _ in range(2):
            weight.grad = torch.tensor([1.0, -1.0, 1e-3, 0.0])
            torch.nn.utils.clip_grad_norm_([weight], norm)
            optimizer.step()
            scheduler.step()
        assert weight.isfinite().all(), section


@pytest.mark.parametrize("epochs", ends(Epochs))
@pytest.mark.parametrize("batch", [1, 10**6])
def test_training_has_at_least_one_step_and_finitely_many(epochs: float, batch: int) -> None:
    plan = plan_batches(TrainRecipe(epochs=epochs, batch_size=batch), windows=10, processes=1)
    assert 1 <= plan.steps <= 10 * 10**6


@pytest.mark.parametrize("divergence", PARAMETERS)
def test_losses_and_their_gradients_stay_finite(divergence: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(6, 8, generator=generator).requires_grad_()
    head = LMHead(torch.randn(11, 8, generator=generator).requires_grad_())
    signal = LogitsSignal(20 * torch.randn(6, 11, generator=generator))
    targets_N = torch.arange(6)
    for term in terms_at_the_ends(divergence):
        loss = fused_loss(hidden_ND, head, [_term(term)], signal=signal, targets_N=targets_N).total
        gradients = torch.autograd.grad(loss, [hidden_ND, head.weight_VD])
        assert loss.isfinite(), term
        assert all(gradient.isfinite().all() for gradient in gradients), term


def terms_at_the_ends(divergence: str) -> list[LogitsTerm]:
    temperatures = [1.0] if divergence == "cross_entropy" else ends(Temperature)
    values = [0.0, 1e-6, 0.5, 0.999999, 1.0, *([10.0] if divergence == "alpha_beta" else [])]
    names = list(PARAMETERS[divergence])
    found = []
    for temperature, weight, *given in itertools.product(
        temperatures, ends(Weight), *[values] * len(names)
    ):
        parameters = dict(zip(names, given, strict=True))
        try:
            found.append(
                LogitsTerm(
                    divergence=divergence, temperature=temperature, weight=weight, **parameters
                )
            )
        except ValueError:
            assert parameters  # a divergence that is 0 or undefined there
    return found


def test_scheduled_weights_stay_finite() -> None:
    for start, end in itertools.product(ends(Weight), repeat=2):
        schedule = Schedule(start, end, 0.0, 1e-6, "cosine")
        assert all(0 <= schedule.at(progress) <= 1e6 for progress in (0.0, 5e-7, 1.0))


def test_tokens_are_drawn_at_any_temperature() -> None:
    logits_BV = torch.tensor([[0.0, 50.0, -50.0, 1000.0]])
    for temperature, share, uniform in itertools.product(
        ends(SamplingTemperature), ends(Share), [0.0, 0.999999]
    ):
        (token,) = next_tokens(logits_BV, [temperature], [share], [uniform])
        assert token == 3 or (temperature > 1 and share == 1 and token in range(4))


def test_duplicates_are_found_at_any_similarity() -> None:
    for similarity in ends(Similarity):
        texts = NearDuplicates(similarity)
        assert texts.add(["one", "two", "three", "four"]) is None
        assert texts.add(["one", "two", "three", "four"]) is not None


def test_choosing_a_threshold_works_at_any_target_and_confidence() -> None:
    p_NC = torch.tensor([[0.9, 0.1]] * 30 + [[0.6, 0.4]] * 30)
    true_N = torch.tensor([0] * 50 + [1] * 10)
    for target, confidence in itertools.product(ends(PartialShare), repeat=2):
        AbstainRecipe(target=target, confidence=confidence)
        choose_threshold(p_NC, true_N, target, confidence)


def test_budgets_hold_at_any_price() -> None:
    for limit, price in itertools.product(ends(Usd), repeat=2):
        budget = Budget(max_usd=limit)
        worst = Spending(1000, Price(price, price).of(500, 500))
        assert budget.reserve(worst) == (worst.usd <= limit)


def test_limits_of_a_divergence_are_positive_and_finite() -> None:
    assert all(0 < limit < float("inf") for limit in ends(Divergence))


@pytest.mark.parametrize("encoding", [TopK(101), TopP(0.9, 101), Stratified(101, 1)])
def test_more_tokens_than_the_vocabulary_has_are_rejected_before_a_run(encoding: Any) -> None:
    with pytest.raises(SignalError, match="cannot store 101 tokens per position") as caught:
        within_vocabulary(encoding, 100)
    assert caught.value.fix == "store 100 or fewer"
    assert within_vocabulary(encoding, 101) is encoding


@pytest.mark.parametrize(("width", "heads"), [(6, 2), (4, 4), (10, 4)])
def test_head_sizes_that_rotary_embeddings_do_not_support_are_rejected(
    width: int, heads: int
) -> None:
    with pytest.raises(ValueError, match=r"must be even|must be a multiple"):
        RandomClassifier(start="random", hidden_size=width, heads=heads)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_an_enormous_configuration_is_rejected_before_it_is_built(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key} is 9,007,199,254,740,992, which is more than"):
        overridden_config(tiny.llama_config(), {key: 2**53})
