"""The student generates rollouts during training, and is unchanged afterwards."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.kv_cache import SlotCache
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.teachers.attention_checks import FLEX
from stillhouse.teachers.packed_attention import NAME as PACKED_ATTENTION
from stillhouse.teachers.packed_attention import packed_attention
from stillhouse.teachers.short_attention import NAME, use_short_attention
from stillhouse.training.draw_rollouts import (
    able_to_generate,
    local_generator,
    slot_seed,
    write_answers,
)
from stillhouse.training.rollouts import Rollout
from stillhouse.training.step_rows import Slot
from stillhouse.training.train_config import OnPolicyRecipe
from tests import tiny

ENDS = frozenset({0})
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
SLOTS = [Slot(number, number, 12) for number in range(3)]


def student() -> Any:
    """A model as in a trainer: in training mode, with dropout, checkpointing, and its attention."""
    model = tiny.llama(seed=3, attention_dropout=0.5)
    name = "activation_checkpointing_enable"  # transformers 5.23 renamed it
    getattr(model, name, model.gradient_checkpointing_enable)()
    use_short_attention(model, 32, torch.device("cpu"))
    model.config.use_cache = False
    model.train()
    model.model.norm.eval()  # a module that the user put in eval mode
    return model


def written(model: Any, **section: Any) -> list[Rollout]:
    recipe = OnPolicyRecipe.model_validate(section)
    with local_generator(2, torch.float32, model, ENDS) as generator:
        return write_answers(generator, SLOTS, PROMPTS, recipe, 7)


def test_modes_attention_and_random_state_are_restored() -> None:
    model = student()
    before = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    written(model)
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == NAME
    assert model.config.use_cache is False
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(ZeroDivisionError), able_to_generate(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("name", [NAME, PACKED_ATTENTION, FLEX])
def test_generation_uses_sdpa_whatever_the_windows_use(name: str) -> None:
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model = student()
    model.set_attn_implementation(name)
    with able_to_generate(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == name


def test_weights_in_bfloat16_are_float32_again_afterwards() -> None:
    """Rollouts are generated with the bfloat16 values that matrix products in training use."""
    model = student()
    before = [(each, each.data_ptr(), each.detach().clone()) for each in model.parameters()]
    with local_generator(2, torch.bfloat16, model, ENDS) as generator:
        packed = {layer.weight for layer in model.modules() if "forward" in vars(layer)}
        others = [each for each in model.parameters() if each not in packed]
        assert {each.dtype for each in others} == {torch.bfloat16}
        narrow = write_answers(generator, SLOTS, PROMPTS, OnPolicyRecipe(), 7)
    for each, place, value in before:
        assert each.data_ptr() == place
        assert torch.equal(each, value)
    plain = tiny.llama(seed=3)
    for each in plain.parameters():
        each.data = each.data.bfloat16()
    with local_generator(2, torch.float32, plain, ENDS) as generator:
        assert write_answers(generator, SLOTS, PROMPTS, OnPolicyRecipe(), 7) == narrow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_window_is_generated_with_the_current_weights(dtype: torch.dtype) -> None:
    model, other = student(), student()

    def window(model: Any) -> list[Rollout]:
        with local_generator(2, dtype, model, ENDS) as generator:
            return write_answers(generator, SLOTS, PROMPTS, OnPolicyRecipe(), 7)

    before = window(model)
    for one in (model, other):
        torch.manual_seed(1)
        for parameter in one.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    assert window(model) == window(other) != before


def test_gaps_on_the_heap_are_returned_before_and_after_generating(monkeypatch: Any) -> None:
    """Tensors of training and generation differ in size. When gaps are returned, neither bfloat16
    weights nor keys and values exist."""
    model = student()
    dtypes: list[torch.dtype] = []
    caches: list[bool] = []
    made: list[weakref.ref[Any]] = []

    def make(*sizes: int) -> SlotCache:
        cache = SlotCache(*sizes)
        made.append(weakref.ref(cache.layers[0]))
        return cache

    def record() -> None:
        dtypes.append(next(model.parameters()).dtype)
        caches.append(any(layer() is not None for layer in made))

    monkeypatch.setattr("stillhouse.generation.local_generator.SlotCache", make)
    monkeypatch.setattr("stillhouse.training.draw_rollouts.return_gaps", record)
    with local_generator(2, torch.bfloat16, model, ENDS) as generator:
        write_answers(generator, SLOTS, PROMPTS, OnPolicyRecipe(), 7)
    assert len(made) == 1
    assert dtypes == [torch.float32, torch.float32]
    assert caches == [False, False]


def test_greedy_rollouts_match_the_model_without_dropout() -> None:
    plain = tiny.llama(seed=3)
    for rollout, prompt in zip(written(student(), temperature=0.0), PROMPTS, strict=True):
        asked = torch.tensor([prompt])
        expected = plain.generate(asked, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        assert list(rollout.ids) == expected.tolist()[: len(rollout.ids)]
        assert rollout.stop == ("stop" if rollout.ids[-1] == 0 else "length")


def test_probabilities_of_the_generator_match_a_forward_pass() -> None:
    model = student()
    recipe = OnPolicyRecipe()
    with local_generator(2, torch.float32, model, ENDS) as generator:
        asked = write_answers(generator, SLOTS, PROMPTS, recipe, 7)[0]
    plain = tiny.llama(seed=3)
    log_q = plain(torch.tensor([asked.ids]), use_cache=False).logits[0].detach().log_softmax(-1)
    chosen = [float(log_q[at - 1, asked.ids[at]]) for at in range(asked.given, len(asked.ids))]
    seed = slot_seed(7, 0, PROMPTS[0])
    prompt = TokenPrompt(PROMPTS[0], 12, temperature=1.0, seed=seed, logprobs=True)
    ((_, again),) = LocalGenerator(plain, ENDS).generate([prompt])
    assert list(again.ids) == list(asked.own)
    assert again.logprobs == pytest.approx(chosen, abs=1e-4)


def test_draws_depend_on_the_seed_the_slot_and_the_prompt() -> None:
    base = slot_seed(7, 0, [5, 6])
    others = {slot_seed(8, 0, [5, 6]), slot_seed(7, 1, [5, 6]), slot_seed(7, 0, [56])}
    assert base not in others
    assert len(others) == 3
    model = student()
    again = [Slot(3, 0, 12), Slot(0, 0, 12)]
    recipe = OnPolicyRecipe()
    with local_generator(2, torch.float32, model, ENDS) as generator:
        other, same = write_answers(generator, again, [PROMPTS[0]] * 2, recipe, 7)
    assert same.own == written(model)[0].own
    assert other.own != same.own
