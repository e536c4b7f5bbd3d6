"""Models alternate in speed measurements; memory is measured in a separate process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig

from stillhouse.errors import ModelError
from stillhouse.evaluation import speed
from stillhouse.evaluation.speed import measure_peak_memory, measure_rates
from tests.clocks import Clock

from .toys import VOCABULARY, save_toy, toy_model


class Sleeper(torch.nn.Module):
    """Takes a second of its clock to read a thousand tokens, or to generate a hundred."""

    def __init__(self, name: str, log: list[str], clock: Clock, slowdown: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.name, self.log, self.clock, self.slowdown = name, log, clock, slowdown

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        if past_key_values is None:
            self.log.append(self.name)
        seconds = input_ids.numel() / (1000 if past_key_values is None else 100)
        self.clock.now += seconds * self.slowdown
        return _Output(torch.zeros(1, 1, VOCABULARY))


class _Output:
    past_key_values = "a cache"

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def sizes(patch: pytest.MonkeyPatch, prompt_tokens: int, decode_tokens: int) -> None:
    """Measure this many tokens, in three rounds."""
    patch.setattr(speed, "PROMPT_TOKENS", prompt_tokens)
    patch.setattr(speed, "DECODE_TOKENS", decode_tokens)
    patch.setattr(speed, "ROUNDS", 3)


def test_rates_are_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes(monkeypatch, 50, 4)
    log: list[str] = []
    clock = Clock()
    models = {
        "fast": Sleeper("fast", log, clock),
        "slow": Sleeper("slow", log, clock, slowdown=2.0),
    }
    rates = measure_rates(models, VOCABULARY, clock=clock.read)
    assert rates["fast"].prefill_tokens_per_s == pytest.approx(1000)
    assert rates["fast"].decode_tokens_per_s == pytest.approx(100)
    assert rates["slow"].prefill_tokens_per_s == pytest.approx(500)
    assert rates["slow"].decode_tokens_per_s == pytest.approx(50)


def test_models_alternate_in_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes(monkeypatch, 4, 1)
    log: list[str] = []
    models = {name: Sleeper(name, log, Clock()) for name in "abc"}
    measure_rates(models, VOCABULARY)
    assert log == [*"abc", *"bca", *"cab", *"abc"]


def test_one_slow_round_does_not_move_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter([(9.0, 9.0), (1.0, 2.0), (50.0, 50.0), (1.0, 2.0)])  # the first is warm-up
    monkeypatch.setattr(speed, "prefill_and_decode", lambda *arguments: next(timings))
    sizes(monkeypatch, 10, 4)
    rates = measure_rates({"a": toy_model()}, VOCABULARY)
    assert rates["a"] == speed.Rates(10.0, 2.0)


def test_decoding_feeds_one_token_per_step_to_a_growing_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = toy_model()
    forward, seen = model.forward, []

    def spy(**inputs: Any) -> Any:
        cache = inputs.get("past_key_values")
        past = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
        seen.append((inputs["input_ids"].shape[1], past))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", spy)
    speed.prefill_and_decode(model, torch.zeros(1, 6, dtype=torch.long), 3)
    assert seen == [(6, 0), (1, 6), (1, 7), (1, 8)]


@pytest.mark.run
def test_decoding_uses_a_cache_with_a_different_name() -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    seen: list[Any] = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs.get("cache_params")), with_kwargs=True
    )
    speed.prefill_and_decode(model, torch.zeros(1, 6, dtype=torch.long), 2)
    assert [cache is not None for cache in seen] == [False, True, True]


@pytest.mark.run
def test_peak_memory_grows_with_the_model(tmp_path: Path) -> None:
    small = save_toy(tmp_path / "small", toy_model())
    large = save_toy(tmp_path / "large", toy_model(vocabulary=1_000_000))
    difference = measure_peak_memory(large, torch.float32) - measure_peak_memory(
        small, torch.float32
    )
    head = 1_000_000 * 32 * 4  # read completely; only one row of the embeddings is read
    assert 0.9 * head < difference < 4 * head


@pytest.mark.run
@pytest.mark.fresh_process
def test_peak_memory_is_that_of_a_complete_process(tmp_path: Path) -> None:
    """Importing torch and transformers takes hundreds of MB."""
    assert measure_peak_memory(save_toy(tmp_path, toy_model()), torch.float32) > 100 << 20


@pytest.mark.run
def test_a_model_that_cannot_be_loaded_is_an_error_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="measures the model's memory failed") as raised:
        measure_peak_memory(tmp_path / "nothing", torch.float32)
    assert "evaluate.speed: false" in str(raised.value.fix)
