"""Search for a shape in four stages, each of which passes its best shapes to the next.

1. List all aligned shapes that meet the target (pruning.shapes).
2. If there are many, probe each axis alone, and rank the shapes by the sum (probes).
3. Prune and refit the best `candidates`, and measure them on held-out text.
4. Distill the best `trained` of them for a few steps. The better half continues for twice as many,
   and so on.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from stillhouse.atomic_files import write_atomically
from stillhouse.data.draw_windows import ChosenWindows
from stillhouse.data.windows import WindowSet
from stillhouse.hardware import free_memory
from stillhouse.progress import console, note
from stillhouse.pruning.axes import Axes, axes_of
from stillhouse.pruning.depth import DepthChoice
from stillhouse.pruning.offload import load_offloaded, released_after_use, save_model
from stillhouse.pruning.prune import Calibration, prune_model, rank_layers
from stillhouse.pruning.reference import Reference, mean_kl, reference_on
from stillhouse.pruning.shapes import Counter, described, feasible_shapes, sizes_to_prune
from stillhouse.pruning.sizes import Sizes, sizes_of
from stillhouse.search.candidates import candidates_table
from stillhouse.search.probes import curves, expected, probed
from stillhouse.search.search_text import SearchText, batches_of, split_text
from stillhouse.search.shape_costs import costs_of
from stillhouse.search.short_training import distill_shortly
from stillhouse.search.trial_log import Journal
from stillhouse.shared_work import ALONE, Processes
from stillhouse.students.pruned_student import placed
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.load_model import load_config, load_model
from stillhouse.teachers.model_source import AnyModel, source_of
from stillhouse.teachers.packed_attention import use_attention
from stillhouse.teachers.quiet import quiet
from stillhouse.training.train_config import TrainRecipe

CANDIDATES = "candidates.json"
WORK = "work"
"""Folder for pruned candidates and the journal until the search is finished."""
JOURNAL = "journal"
PROBE_ROWS = 8
"""A probe's calibration tokens per refit column. With fewer, the refit fits noise: SmolLM2's FFN
(1,536 neurons), cut to 1,024, has a KL of 1.00 if refit on 2,048 tokens, and 0.41 on 16,384."""
DEPTH_TOKENS = 1024
WORTH = 2.0
"""Stop removing layers when that costs this many times as much as the best shape of full depth."""
KEPT_BYTES = 4 << 30
"""The start model's stream on the calibration rows is kept for all candidates if it is at most this
large."""


@dataclass(frozen=True)
class Setting:
    """The inputs of a search.

    vocabulary: number of token ids that both models have.
    dtype: of matrix products.
    served: dtype of the exported weights.
    processes: search together in the same folder, sharing the candidates.
    """

    section: PrunedStudent
    train: TrainRecipe
    start: AnyModel
    teacher: AnyModel
    windows: WindowSet
    vocabulary: int
    seed: int
    dtype: torch.dtype
    served: torch.dtype
    device: torch.device
    out: Path
    processes: Processes = ALONE


@dataclass
class Candidate:
    """A shape, and its measurements.

    cost: in the target's unit.
    expected: sum of the separate costs of its cuts, in nats/token.
    one_shot_kl: KL to the teacher after pruning and refitting, in nats/token.
    trained_kl: KL to the teacher after each round of training, in nats/token.
    """

    sizes: Sizes
    cost: float
    parameters: int
    expected: float | None = None
    one_shot_kl: float | None = None
    trained_kl: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """The result of a search.

    sizes: keyword arguments of `prune_model`.
    tokens: number of tokens that candidates were trained on.
    flops: of all measurements, in all processes.
    seconds: spent by this process, over all starts.
    """

    sizes: dict[str, int]
    candidates: list[Candidate]
    tokens: int
    described: str
    flops: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)


def search_shape(setting: Setting) -> Found:
    """Find the best shape, print a table of measured shapes, and write CANDIDATES.

    If a search with the same setting was killed, resumes where it stopped.

    Raises RecipeError, naming the nearest shape, if none meets the target, and DataError if the
    text is too short.
    """
    (setting.out / WORK).mkdir(parents=True, exist_ok=True)
    journal = Journal(setting.out / WORK / JOURNAL, setting.processes)
    config = load_config(setting.start)
    counter = Counter(config)
    search, target = setting.section.search, setting.section.target
    assert target is not None
    costs = costs_of(config, counter, search, target, setting.served, setting.device, journal)
    shapes = feasible_shapes(config, search, costs.of, costs.limit)
    found = [Candidate(shape, costs.of(shape), counter.total(shape)) for shape in shapes]
    work = _Work(setting, journal, sizes_of(config), axes_of(config))
    best = work.by_axes(found)
    left_out = len(found) - len(best)
    if setting.processes.leads:
        note(
            f"{len(found)} shapes are at most {search.tolerance:.0%} below {costs.limit}"
            + (f"; {left_out} ruled out by the cost of each axis alone" if left_out else "")
        )
    if len(best) > 1:
        best = work.by_pruning(best)
        best = work.by_training(best)
    chosen = best[0]
    name = described(work.before, chosen.sizes)
    sizes = sizes_to_prune(work.before, chosen.sizes)
    result = Found(sizes, found, work.tokens, name, journal.flops, journal.seconds)
    if setting.processes.leads:
        console.print(candidates_table(work.before, found, chosen, costs))
        note(f"chosen: {name}")
        plain = {
            "target": asdict(costs.limit),
            "measured": costs.measured,
            "chosen": sizes,
            "candidates": [asdict(candidate) for candidate in found],
        }
        write_atomically(setting.out / CANDIDATES, json.dumps(plain, indent=2))
    return result


class _Work:
    """The state that the candidates of a search share."""

    def __init__(self, setting: Setting, journal: Journal, before: Sizes, rules: Axes) -> None:
        self.setting = setting
        self.search = setting.section.search
        self.journal = journal
        self.before = before
        self.rules = rules
        self.shared: dict[int, Calibration] = {}
        self.depth: DepthChoice | None = None
        self.tokens = 0

    @property
    def calibration_tokens(self) -> int:
        return min(self.search.calibration_tokens, self.setting.section.calibration_tokens)

    def _fits(self, tokens: int) -> bool:
        # Streams after attention and after the layer, and the inputs of output norms.
        kept = 2 + len(self.rules.output_norms())
        return kept * 4 * tokens * self.before.layers * self.before.hidden_size <= KEPT_BYTES

    def _share(self, tokens: int) -> Calibration:
        """The state that all prunes on this many tokens share. All drop layers in the same
        order."""
        if tokens not in self.shared:
            # Keep only one, because it can be as large as the model.
            self.shared = {tokens: Calibration(passages=[] if self._fits(tokens) else None)}
        self.shared[tokens].depth = self.depth
        return self.shared[tokens]

    @cached_property
    def text(self) -> SearchText:
        windows = self.setting.train.batch_size * self.search.winner_steps
        setting = self.setting
        return split_text(setting.windows, self.search.heldout_tokens, windows, setting.seed)

    @cached_property
    def known(self) -> tuple[Reference, Reference]:
        """The teacher's outputs on the held-out text, and on the text of short distillations."""
        setting = self.setting
        teacher = self._load(setting.teacher)

        def reference(windows: ChosenWindows, together: int) -> Reference:
            batches = batches_of(windows, together, setting.device)
            return reference_on(teacher, batches, setting.dtype, setting.vocabulary)

        with released_after_use(teacher):
            heldout = reference(self.text.heldout, 8)
            if self.search.trained < 2:
                return heldout, heldout
            return heldout, reference(self.text.training, setting.train.batch_size)

    def _load(self, model: AnyModel) -> Any:
        free_memory()
        return placed(load_offloaded(model), self.setting.section, self.setting.device)

    def _measure(self, model: Any) -> float:
        with released_after_use(model):
            return mean_kl(self.known[0], model, self.setting.dtype)

    def by_axes(self, found: list[Candidate]) -> list[Candidate]:
        """The most promising candidates, at most `candidates`; all of them if there are few."""
        if len(found) <= self.search.candidates:
            return found
        probes = probed(self.before, [one.sizes for one in found], self._possible)
        finds = {"start": lambda: self._measure(self._load(self.setting.start))}
        for shape in itertools.chain(*probes.values()):
            finds[self._named("probe", shape)] = partial(self._probe, shape)
        self.journal.divide(finds)
        kl = self.journal.found

        def lost(shape: Sizes) -> float:
            return max(0.0, float(kl[self._named("probe", shape)] - kl["start"]))

        known = curves(self.before, probes, lost)
        full_depth = [one.sizes for one in found if one.sizes.layers == self.before.layers]
        limit = min((expected(self.before, s, known, {}) for s in full_depth), default=float("inf"))
        keep = min(one.sizes.layers for one in found)
        depth = self._depth(keep, WORTH * limit)
        for one in found:
            one.expected = expected(self.before, one.sizes, known, depth)
        return sorted(found, key=lambda one: _least(one.expected))[: self.search.candidates]

    def _possible(self, shape: Sizes) -> bool:
        return not self.rules.hidden_over_heads or shape.hidden_size % shape.heads == 0

    def _probe(self, shape: Sizes) -> float:
        """Prune to the shape and measure it, calibrating on as many tokens as the widest refit
        needs, if available."""
        note(f"probing {described(self.before, shape)}")
        before = self.before
        width = before.hidden_size
        if shape.ffn_size < before.ffn_size:
            width = before.ffn_size
        elif shape.heads < before.heads:
            width = before.heads * before.head_dim
        return self._measure(self._pruned(shape, min(self.calibration_tokens, PROBE_ROWS * width)))

    def _pruned(self, shape: Sizes, tokens: int) -> Any:
        setting = self.setting
        model = self._load(setting.start)
        prune_model(
            model,
            self.text.calibration,
            **sizes_to_prune(self.before, shape),
            reconstruct=setting.section.refit,
            calibration_tokens=tokens,
            seed=setting.seed,
            dtype=setting.dtype,
            shared=self._share(tokens),
            method=setting.section,
        )
        return model

    def _depth(self, keep: int, most_kl: float) -> dict[int, float]:
        """Cost in nats/token by number of remaining layers, as far down as worthwhile. All later
        prunes remove layers in the same order."""
        total = self.before.layers
        if keep == total:
            return {}

        def find() -> dict[str, Any]:
            model, setting = self._load(self.setting.start), self.setting
            ranked = rank_layers(
                model,
                self.text.calibration,
                keep,
                setting.section,
                setting.seed,
                setting.dtype,
                tokens=DEPTH_TOKENS,
                most_kl=most_kl,
                processes=setting.processes,
            )
            return asdict(ranked)

        raw = self.journal.once_together("depth", find)
        dropped = tuple((int(index), float(kl)) for index, kl in raw["dropped"])
        self.depth = DepthChoice(tuple(raw["kept"]), dropped, tuple(raw["single_kl"]))
        return {total - place: kl for place, (_, kl) in enumerate(dropped, 1)}

    def by_pruning(self, best: list[Candidate]) -> list[Candidate]:
        """Prune and measure each candidate; keep the best `trained` of them on disk."""
        names = {self._named("one-shot", one.sizes): one for one in best}

        def measured() -> list[Candidate]:
            """Sort the candidates measured so far, best first, and delete the losers' folders."""
            known = self.journal.found
            for name, one in names.items():
                one.one_shot_kl = known.get(name)
            found = [one for one in best if one.one_shot_kl is not None]
            found.sort(key=lambda one: _least(one.one_shot_kl))
            for loser in found[self.search.trained :]:
                shutil.rmtree(self._folder(loser, 0), ignore_errors=True)
            return found

        self.journal.divide(
            {name: partial(self._one_shot, one) for name, one in names.items()}, after=measured
        )
        return measured()

    def _named(self, work: str, shape: Sizes) -> str:
        return f"{work} {described(self.before, shape)}"

    def _one_shot(self, one: Candidate) -> float:
        note(f"pruning {described(self.before, one.sizes)}")
        model = self._pruned(one.sizes, self.calibration_tokens)
        if self.search.trained > 1:
            self._save(model, self._folder(one, 0))
        return self._measure(model)

    def by_training(self, best: list[Candidate]) -> list[Candidate]:
        """Rank candidates by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943)."""
        alive, round_, first = best[: self.search.trained], 1, 0
        if len(alive) < 2:
            return best
        while len(alive) > 1:
            steps = self.search.steps * 2 ** (round_ - 1)
            self.shared.clear()
            trains = {
                self._named(f"round {round_}", one.sizes): partial(
                    self._train, one, round_, first, steps
                )
                for one in alive
            }
            for one, kl in zip(alive, self.journal.divide(trains), strict=True):
                shutil.rmtree(self._folder(one, round_ - 1), ignore_errors=True)
                one.trained_kl.append(kl)
                self.tokens += self._trained_tokens(first, steps)
            alive = sorted(alive, key=lambda one: one.trained_kl[-1])[: len(alive) // 2]
            first, round_ = first + steps, round_ + 1
        return [*alive, *(one for one in best if one not in alive)]

    def _train(self, one: Candidate, round_: int, first: int, steps: int) -> float:
        setting, known = self.setting, self.known[1]
        before = self._folder(one, round_ - 1)
        if not before.is_dir():
            # Only the pruned model can be missing, since a round is saved before it is logged.
            assert round_ == 1
            self._one_shot(one)
        note(f"training {described(self.before, one.sizes)} for {steps} steps")
        # Load it into memory, whatever its size: training changes all weights at every step.
        saved = source_of(setting.start).derived(before)
        model = load_model(saved, dtype=torch.float32)
        model.to(setting.device)
        context = known.batches[0].input_ids_RL.shape[1]
        use_attention(model, context, setting.device, setting.dtype)
        distill_shortly(
            model, known, first=first, steps=steps, section=setting.train, dtype=setting.dtype
        )
        self._save(model, self._folder(one, round_))
        return self._measure(model)

    def _trained_tokens(self, first: int, steps: int) -> int:
        rows = self.known[1].rows
        return sum(len(rows[(first + step) % len(rows)]) for step in range(steps))

    def _folder(self, one: Candidate, round_: int) -> Path:
        name = described(self.before, one.sizes).replace(": ", "-").replace(", ", "_")
        return self.setting.out / WORK / f"{name}_round-{round_}"

    def _save(self, model: Any, folder: Path) -> None:
        """Save atomically, so that a killed search does not resume with half a candidate."""
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with quiet():
            save_model(model, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _least(kl: float | None) -> float:
    return float("inf") if kl is None else kl
