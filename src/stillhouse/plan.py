"""Estimates what a run would take on hardware that need not be present, from configurations
alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stillhouse.atomic_files import write_atomically
from stillhouse.config.load_recipe import load_language_model_recipe
from stillhouse.errors import RecipeError
from stillhouse.family.members import first_member, planned_models
from stillhouse.language_model.data_stage import expected_tokens
from stillhouse.language_model.job import find_configurations
from stillhouse.language_model.run_models import RunModels
from stillhouse.language_model.run_plan import plan_stages
from stillhouse.number_format import DASH, count, seconds, size
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import config_size
from stillhouse.planning.stage_estimate import StageEstimate
from stillhouse.planning.step_memory import described
from stillhouse.pruning.pruning_config import read_amount


@dataclass(frozen=True)
class RunPlan:
    """A run's estimated requirements.

    tokens: the number of training tokens. models: a one-line description of each model.
    """

    machine: Machine
    tokens: int
    models: tuple[str, ...]
    stages: tuple[StageEstimate, ...]

    @property
    def fits(self) -> bool:
        return all(stage.memory.fits(self.machine.memory) for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """The time of all stages with known work; None if the GPU's rate is unknown."""
        known = [stage.seconds(self.machine) for stage in self.stages]
        found = [each for each in known if each is not None]
        return sum(found) if found else None

    @property
    def dollars(self) -> float | None:
        price, time = self.machine.price, self.seconds
        if price is None or time is None:
            return None
        return time / 3600 * price * self.machine.processes

    @property
    def disk(self) -> float:
        """The peak disk usage in bytes if nothing is deleted."""
        left = 0.0
        most = 0.0
        for stage in self.stages:
            left += stage.disk
            most = max(most, left + stage.scratch)
        return most

    @property
    def host(self) -> float:
        """The peak host memory per node in bytes."""
        per_node = self.machine.per_node
        return max(
            min(stage.processes, per_node) * sum(stage.memory.host.values())
            for stage in self.stages
        )

    def save(self, path: Path) -> None:
        """Write the plan as JSON, in bytes, seconds, and dollars. Raises RunError if the file
        cannot be written."""
        machine = self.machine
        stages = [
            {
                **asdict(stage),
                "memory_bytes": stage.memory.total,
                "fits": stage.memory.fits(machine.memory),
                "seconds": stage.seconds(machine),
                "dollars": stage.dollars(machine),
            }
            for stage in self.stages
        ]
        facts = {
            "machine": asdict(machine),
            "tokens": self.tokens,
            "fits": self.fits,
            "seconds": self.seconds,
            "dollars": self.dollars,
            "disk_bytes": self.disk,
            "host_bytes": self.host,
            "stages": stages,
        }
        write_atomically(path, json.dumps(facts, indent=2) + "\n")


def plan_recipe(path: str | Path, machine: Machine, overrides: Sequence[str] = ()) -> RunPlan:
    """Plan a language model's or a family's recipe.

    Only reads the models' config.json, which is downloaded for a Hub id. Raises StillhouseError if
    the recipe has a task, a model has no configuration or an unknown architecture, neither the
    recipe nor the size of its text determines the number of training tokens, or there are more
    processes than windows.
    """
    recipe, base = load_language_model_recipe(path, overrides), Path(path).parent
    tokens = expected_tokens(recipe.data, base)
    if tokens is None:
        raise RecipeError(
            "the number of training tokens is unknown: the text is a dataset, is missing, or is "
            "very short",
            where="data.train_tokens",
            fix="set data.train_tokens, in the recipe or with --set data.train_tokens=1000000000",
        )
    planned = planned_models(recipe, find_configurations(first_member(recipe), base))
    stages = [stage for models in planned for stage in plan_stages(models, machine, tokens)]
    return RunPlan(machine, tokens, _described(planned), tuple(stages))


def described_machine(
    gpus: int, memory: str, nodes: int, rate: float | None, price: float | None
) -> Machine:
    """Build a machine from a user's options: memory such as 80GB, TFLOP/s per GPU, and dollars per
    GPU-hour.

    Raises RecipeError if `memory` is not an amount with a unit.
    """
    try:
        amount = read_amount("memory", memory)
        known = not amount.relative and not memory.strip().replace(".", "").isdigit()
    except ValueError:
        known = False
    if not known:
        raise RecipeError(
            f"{memory!r} is not an amount of memory",
            where="--gpu-memory",
            fix="write a number and a unit, such as 80GB or 24GiB",
        )
    flops = None if rate is None else rate * 1e12
    return Machine("cuda", amount.value, gpus, nodes, flops, price)


# --- what is shown ---------------------------------------------------------------------------


def plan_table(plan: RunPlan) -> RenderableType:
    """Render the models, a row per stage, the totals, and a fix for each stage that does not
    fit."""
    lines = [Text(line) for line in plan.models]
    machine = plan.machine
    nodes = f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    lines.append(Text(f"{machine.processes} GPUs with {size(machine.memory)} each{nodes}"))
    table = Table(box=None, padding=(0, 1))
    for title in ("stage", "memory/GPU", "fits", "tokens/s", "time", "cost", "disk"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for stage in plan.stages:
        table.add_row(*_row(stage, machine))
    notes = [
        Text.assemble((f"{stage.name}: ", "bold"), about)
        for stage in plan.stages
        if (about := _about(stage))
    ]
    fixes = [
        Text(f"{stage.name} does not fit: {stage.fix}", "bold red")
        for stage in plan.stages
        if stage.fix
    ]
    return Group(*lines, Text(), table, Text(), *notes, *_sums(plan), *fixes)


def _row(stage: StageEstimate, machine: Machine) -> list[str | Text]:
    memory, took = stage.memory, stage.seconds(machine)
    speed = f"{stage.tokens / took:,.0f}" if took and stage.tokens else DASH
    if not memory.parts:
        fits = Text(DASH)
    elif memory.fits(machine.memory):
        fits = Text("yes", "green")
    elif memory.cannot_fit(machine.memory):
        fits = Text("no", "bold red")
    else:
        fits = Text("maybe", "yellow")
    return [
        stage.name,
        size(memory.total) if memory.parts else DASH,
        fits,
        speed,
        DASH if took is None else seconds(took),
        DASH if (cost := stage.dollars(machine)) is None else f"${cost:,.2f}",
        size(stage.disk + stage.scratch) if stage.disk or stage.scratch else DASH,
    ]


def _about(stage: StageEstimate) -> str:
    """Describe what takes up a stage's memory, followed by its note."""
    memory = stage.memory
    lines = [str(memory)] if memory.parts else []
    if memory.host:
        lines.append(f"on the host: {described(memory.host)}")
    if stage.note:
        lines.append(stage.note)
    return "; ".join(lines)


def _sums(plan: RunPlan) -> list[Text]:
    machine = plan.machine
    network = sum(stage.network for stage in plan.stages)
    crossing = sum(stage.between_nodes for stage in plan.stages)
    lines = [f"disk: {size(plan.disk)} at most; host memory per node: {size(plan.host)}"]
    if network:
        text = f"network: each process sends {size(network)}"
        lines.append(text + (f", {size(crossing)} of it to other nodes" if crossing else ""))
    if plan.seconds is None:
        lines.append("time: pass --rate, the TFLOP/s per GPU in training, to estimate it")
    else:
        price = "" if plan.dollars is None else f", ${plan.dollars:,.0f}"
        lines.append(
            f"time: {seconds(plan.seconds)} of computing on {machine.processes} GPUs{price}, not "
            "counting pruning, quantization, and waiting for the network"
        )
    return [Text(line) for line in lines]


def _described(planned: Sequence[RunModels]) -> tuple[str, ...]:
    teacher = planned[0].teacher
    lines = [f"teacher: {count(config_size(teacher).parameters)} parameters ({teacher.model_type})"]
    for models in planned:
        name = f"student {models.member}".strip()
        lines.append(f"{name}: {count(config_size(models.student).parameters)} parameters")
    return tuple(lines)
