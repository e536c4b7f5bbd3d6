"""Batched generation returns the same answers as `model.generate` for each prompt alone."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers import Qwen3ForCausalLM as Qwen3

from stillhouse.errors import ModelError
from stillhouse.generation import local_generator
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.kv_cache import SlotCache
from stillhouse.generation.local_generator import LocalGenerator, local_text
from stillhouse.generation.request import Answer, Failure, Request
from tests import tiny

pytestmark = pytest.mark.run

ENDS = list(range(24))
"""Tokens that end an answer, enough that random models occasionally write one."""


def requests(count: int, seed: int = 0, **parameters: Any) -> list[Request]:
    """Prompts of 1 to 60 characters, answers of at most 1 to 30 tokens."""
    chance = random.Random(seed)
    return [
        Request(
            "local",
            "tiny",
            (
                {
                    "role": "user",
                    "content": "".join(chance.choices("abcde ", k=chance.randint(1, 60))),
                },
            ),
            {"max_tokens": chance.randint(1, 30), "temperature": 0.0, **parameters},
        )
        for _ in range(count)
    ]


def answered(model: Any, asked: Any, batch: int = 32) -> dict[str, Answer | Failure]:
    """Outcomes by the request's key."""
    generator = local_text(model, tiny.tokenizer(), batch=batch)
    return {request.key: outcome for request, outcome in generator.answers(asked)}


def reference(model: Any, request: Request) -> tuple[str, int]:
    """The greedy answer of `model.generate` to this prompt alone, and its number of tokens."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in request.messages],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    config = GenerationConfig(
        max_new_tokens=request.parameters["max_tokens"],
        do_sample=False,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    written = new[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True), len(written)


def small(kind: Any, config: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tiny.tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return kind(config(**{**sizes, **changes})).eval()


MODELS = {
    "llama": lambda: tiny.llama(),
    "qwen3": lambda: small(Qwen3, Qwen3Config),
    "mistral with a window": lambda: small(MistralForCausalLM, MistralConfig, sliding_window=16),
    "gemma3 with some windows": lambda: small(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_equal_those_of_generate(name: str) -> None:
    model = MODELS[name]()
    model.generation_config.eos_token_id = ENDS
    asked = requests(40)
    expected = [reference(model, request) for request in asked]
    for batch in (1, 5, 16):
        found = answered(model, asked, batch)
        assert len(found) == len(asked)
        endings = set()
        for request, text_and_tokens in zip(asked, expected, strict=True):
            answer = found[request.key]
            assert isinstance(answer, Answer)
            assert (answer.text, answer.completion_tokens) == text_and_tokens, f"batch {batch}"
            endings.add(answer.finish_reason)
        assert endings == {"stop", "length"}, "the toy model must produce both"


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
RECURRENT = {
    "mamba": lambda: MambaConfig(**SIZES, state_size=4),
    "rwkv": lambda: RwkvConfig(**SIZES, context_length=64),
    "recurrent gemma, which returns no cache": lambda: RecurrentGemmaConfig(
        **SIZES, intermediate_size=64, num_attention_heads=2, lru_width=32
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_models_with_other_caches_generate_the_same_as_without_a_cache(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RECURRENT[name]()).eval()
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    generator = LocalGenerator(model, frozenset())
    found = dict(generator.generate([TokenPrompt(prompt, 6) for prompt in prompts]))
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        for _ in range(6):  # without a cache
            next_1 = model(ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, next_1[:, None]], 1)
        assert list(found[number].ids) == ids[0, len(prompt) :].tolist()


def test_answers_arrive_before_later_prompts_are_read() -> None:
    read = 0

    def many() -> Any:
        nonlocal read
        for request in requests(1000):
            read += 1
            yield request

    next(iter(local_text(tiny.llama(), tiny.tokenizer(), batch=4).answers(many())))
    assert read <= 8 * 4


@pytest.mark.parametrize(("prompts", "slots"), [(3, 3), (5, 5), (40, 5)])
def test_there_are_no_more_slots_than_prompts(prompts: int, slots: int, monkeypatch: Any) -> None:
    made: list[SlotCache] = []

    def make(layers: int, capacity: int) -> SlotCache:
        made.append(SlotCache(layers, capacity))
        return made[-1]

    monkeypatch.setattr(local_generator, "SlotCache", make)
    answered(tiny.llama(), requests(prompts), 5)
    (cache,) = made
    keys = cache.layers[0].keys
    assert keys is not None
    assert len(keys) == slots


def test_a_cache_has_room_for_all_waiting_prompts_from_the_start(monkeypatch: Any) -> None:
    """A cache that grows exists twice for a moment, and leaves gaps on the heap."""
    asked = [Request("local", "tiny", ({"role": "user", "content": "a" * size},), {"max_tokens": 9})
             for size in (1, 30, 150)]  # fmt: skip
    sizes: list[int] = []
    fill = SlotCache.fill

    def record(cache: SlotCache, first: int, last: int) -> None:
        fill(cache, first, last)
        sizes.append(cache.slots.places)

    monkeypatch.setattr(SlotCache, "fill", record)
    answered(tiny.llama(), asked, 2)
    assert len(sizes) > 1
    assert set(sizes) == {256}


def test_keys_and_values_are_freed_immediately_with_the_cache() -> None:
    """If they waited for the garbage collector, they would add to the peak memory of training."""
    cache = SlotCache(2, 3)
    layer = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()


def test_models_with_sliding_windows_generate_in_batches() -> None:
    model = MODELS["gemma3 with some windows"]()
    asked = requests(40)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    answered(model, asked, 16)
    longest = max(request.parameters["max_tokens"] for request in asked)
    assert len(passes) <= 3 * longest


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
def test_a_sampled_answer_depends_only_on_its_request(name: str) -> None:
    model, asked = MODELS[name](), requests(12, temperature=1.0, top_p=0.9, seed=7)
    alone = answered(model, asked, 1)
    together = answered(model, reversed(asked), 6)
    for request in asked:
        one, other = alone[request.key], together[request.key]
        assert isinstance(one, Answer)
        assert isinstance(other, Answer)
        assert one.text == other.text
    texts = {answer.text for answer in alone.values() if isinstance(answer, Answer)}
    assert len(texts) > 6


def test_a_prompt_beyond_the_models_context_is_a_failure_with_a_reason() -> None:
    long = Request("local", "tiny", ({"role": "user", "content": "a" * 300},), {"max_tokens": 4})
    found = answered(tiny.llama(), [long, *requests(2)])
    failure = found[long.key]
    assert isinstance(failure, Failure)
    assert "the model reads 256" in failure.reason
    assert sum(isinstance(answer, Answer) for answer in found.values()) == 2


def test_a_tokenizer_without_a_chat_template_is_rejected() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        local_text(tiny.llama(), tokenizer)
