"""Measure what shapes cost on this machine: seconds/token from timed blocks, and peak memory.

Models with random weights decode a few tokens with a KV cache, while their attention blocks, FFN
blocks, layers, and whole steps are timed. A block's time only depends on a few sizes: attention on
the heads and the hidden size, and the FFN on its width and the hidden size. So a handful of models
is enough to predict every shape's time:

    seconds/token = ends + layers · (attention + FFN + the rest of a layer)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from stillhouse.errors import ModelError
from stillhouse.evaluation.speed import measure_peak_memory
from stillhouse.generation.kv_cache import caches_of
from stillhouse.hardware import synchronize
from stillhouse.pruning.shapes import Counter
from stillhouse.pruning.sizes import Sizes, resized_config, sizes_of
from stillhouse.scratch import temporary_folder
from stillhouse.search.probes import interpolated
from stillhouse.teachers.activations import decoder_layers
from stillhouse.teachers.load_model import attention_for
from stillhouse.teachers.quiet import quiet

PROMPT_TOKENS, DECODE_TOKENS, WARMUP_TOKENS = 128, 16, 3
TIMED_BYTES = 256 << 20
"""Minimum size of a timed model's weights, if the full model is that large. Smaller weights would
stay in the processor's caches from one token to the next, and be read faster than in practice."""
FFN_WIDTHS = 4
WITHOUT_MEASURING = "set student.target.bytes instead of memory"


@dataclass(frozen=True)
class Timing:
    """Median seconds per decoded token in a timed model with `layers` layers.

    attention, ffn: one block.
    rest: the rest of a layer (norms, sums).
    ends: the rest of a step (embeddings, final norm, head).
    """

    hidden_size: int
    heads: int
    kv_heads: int
    ffn_size: int
    layers: int
    attention: float
    ffn: float
    rest: float
    ends: float


@dataclass(frozen=True)
class LatencyTable:
    timings: tuple[Timing, ...]

    def seconds(self, sizes: Sizes) -> float:
        """Seconds per decoded token; FFN widths between timed ones are interpolated."""
        here = [one for one in self.timings if one.hidden_size == sizes.hidden_size]
        heads = (sizes.heads, sizes.kv_heads)
        attention = [one.attention for one in here if (one.heads, one.kv_heads) == heads]
        assert attention, "every pair of heads and hidden size is timed"
        ffn = [
            (width, statistics.median(one.ffn for one in here if one.ffn_size == width))
            for width in sorted({one.ffn_size for one in here})
        ]
        layer = statistics.median(attention) + interpolated(ffn, sizes.ffn_size)
        layer += statistics.median(one.rest for one in here)
        return statistics.median(one.ends for one in here) + sizes.layers * layer


def shapes_to_time(combinations: Sequence[Sizes], widths: Sequence[int]) -> list[Sizes]:
    """A few shapes that pair every hidden size with every choice of heads and with every FFN
    width."""
    found = []
    for hidden in sorted({shape.hidden_size for shape in combinations}, reverse=True):
        here = [shape for shape in combinations if shape.hidden_size == hidden]
        pairs = sorted({(s.heads, s.kv_heads) for s in here}, reverse=True)
        count = max(len(pairs), len(widths))
        for place in range(count):
            heads, kv_heads = pairs[place % len(pairs)]
            width = widths[place % len(widths)]
            found.append(replace(here[0], heads=heads, kv_heads=kv_heads, ffn_size=width))
    return found


def timed_widths(ffn_size: int, least: int) -> list[int]:
    """Evenly spaced FFN widths, from the original down to `least`."""
    if least >= ffn_size:
        return [ffn_size]
    cuts = {round((ffn_size - least) * i / (FFN_WIDTHS - 1)) for i in range(FFN_WIDTHS)}
    return [ffn_size - cut for cut in sorted(cuts)]


def time_shape(
    config: Any, sizes: Sizes, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Timing:
    """Time decoding by a model of these sizes with random weights, and with enough layers to exceed
    the processor's caches."""
    layers = _enough_layers(config, sizes, dtype.itemsize)
    model = random_like(config, replace(sizes, layers=layers), dtype).to(device)
    groups = {
        "attention": [layer.get_submodule("self_attn") for layer in decoder_layers(model)],
        "ffn": [layer.get_submodule("mlp") for layer in decoder_layers(model)],
        "layer": list(decoder_layers(model)),
        "step": [model],
    }
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    for timed in _decode(model, groups, torch.device(device)):
        for name, value in timed.items():
            seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    blocks = median["attention"] + median["ffn"]
    return Timing(
        hidden_size=sizes.hidden_size,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        ffn_size=sizes.ffn_size,
        layers=layers,
        attention=median["attention"] / layers,
        ffn=median["ffn"] / layers,
        rest=max(0.0, median["layer"] - blocks) / layers,
        ends=max(0.0, median["step"] - median["layer"]),
    )


def random_like(config: Any, sizes: Sizes, dtype: torch.dtype) -> Any:
    """A model of these sizes with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            resized_config(config, sizes), dtype=dtype, attn_implementation=attention_for(config)
        )
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def _decode(
    model: Any, groups: dict[str, list[nn.Module]], device: torch.device
) -> Iterator[dict[str, float]]:
    """Yield each group's total seconds for every decoded token, except the first few."""
    vocabulary = model.config.vocab_size
    prompt_RL = torch.arange(PROMPT_TOKENS, device=device)[None] % vocabulary
    output = model(input_ids=prompt_RL, use_cache=True, logits_to_keep=1)
    for step in range(WARMUP_TOKENS + DECODE_TOKENS):
        next_R1 = output.logits[:, -1:].argmax(-1)
        with _timed(groups, device) as spent:
            output = model(input_ids=next_R1, use_cache=True, **caches_of(output))
        if step >= WARMUP_TOKENS:
            yield spent


@contextmanager
def _timed(groups: dict[str, list[nn.Module]], device: torch.device) -> Iterator[dict[str, float]]:
    spent = dict.fromkeys(groups, 0.0)
    began: dict[str, float] = {}

    def start(name: str, *_: Any) -> None:
        synchronize(device)
        began[name] = time.perf_counter()

    def stop(name: str, *_: Any) -> None:
        synchronize(device)
        spent[name] += time.perf_counter() - began[name]

    with ExitStack() as stack:
        for name, modules in groups.items():
            for module in modules:
                stack.callback(module.register_forward_pre_hook(partial(start, name)).remove)
                stack.callback(module.register_forward_hook(partial(stop, name)).remove)
        yield spent


def _enough_layers(config: Any, sizes: Sizes, width: int) -> int:
    counter = Counter(config)
    one = counter.non_embedding(replace(sizes, layers=1)) * width
    return max(1, min(sizes_of(config).layers, -(-TIMED_BYTES // one)))


@dataclass(frozen=True)
class MemoryLine:
    """Peak memory of loading and decoding, as a linear function of the weights' bytes."""

    base: float
    factor: float

    def bytes(self, weights: float) -> float:
        return self.base + self.factor * weights


def measure_memory(config: Any, dtype: torch.dtype, device: torch.device | str) -> MemoryLine:
    """Measure two models with random weights, one with all layers and one with half of them, each
    in its own process.

    Raises ModelError if a process fails, or if peak memory does not grow with the model.
    """
    start = sizes_of(config)
    counter = Counter(config)
    points = []
    with temporary_folder("stillhouse-memory-") as folder:
        for layers in {start.layers, max(1, start.layers // 2)}:
            sizes = replace(start, layers=layers)
            path = Path(folder) / str(layers)
            with quiet():
                random_like(config, sizes, dtype).save_pretrained(path)
            weights = counter.total(sizes) * dtype.itemsize
            peak = measure_peak_memory(path, dtype, device, instead=WITHOUT_MEASURING)
            points.append((weights, peak))
    if len(points) == 1:
        return MemoryLine(points[0][1] - points[0][0], 1.0)
    (small, low), (large, high) = sorted(points)
    factor = (high - low) / (large - small)
    if factor <= 0:
        raise ModelError(
            "peak memory does not grow with the model on this machine, so it cannot determine a "
            "shape",
            where="student.target.memory",
            fix=WITHOUT_MEASURING,
        )
    return MemoryLine(low - factor * small, factor)
