"""Estimates what a run takes on this machine, for `check`, and whether it can fit at all, for
`run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from stillhouse import account
from stillhouse.data.data_config import CorpusSource, DataRecipe, TextSource
from stillhouse.data.packing import most_windows
from stillhouse.finding import Finding
from stillhouse.language_model.calibration_check import check_calibration
from stillhouse.language_model.data_check import TOKENS
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job, full_job, planned_objective
from stillhouse.language_model.on_policy_check import (
    own_text_findings,
    require_on_policy,
)
from stillhouse.language_model.package_check import require_disk
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.run_models import RunModels, run_models
from stillhouse.language_model.run_plan import plan_stages
from stillhouse.language_model.train_stage import own_prompts
from stillhouse.language_model.training_memory import is_small, with_shard
from stillhouse.launch import world_size
from stillhouse.number_format import count, percent, seconds, size
from stillhouse.pipeline.engine import has_finished
from stillhouse.pipeline.kind import Check
from stillhouse.planning.machine import Machine, this_machine
from stillhouse.planning.model_size import config_size
from stillhouse.planning.stage_estimate import StageEstimate
from stillhouse.planning.step_memory import MARGIN
from stillhouse.processes import require_blocks, shards_in_node
from stillhouse.run_recipe import RunRecipe
from stillhouse.runfolder import Stage
from stillhouse.signals.manifest import read_manifest
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.planned_model import planned_model
from stillhouse.teachers.sharded_teacher import require_plan
from stillhouse.training.train import plan_batches, require_windows
from stillhouse.training.train_config import TrainRecipe


def require_processes(models: RunModels) -> None:
    """Check that the processes of this torchrun can train the models.

    Raises RecipeError if they cannot divide the batch, there is less than a window of training text
    for each, nodes have different numbers of processes, or the student cannot be sharded, and
    ModelError if a teacher cannot be sharded.
    """
    train, processes = models.recipe.train, world_size()
    plan_batches(train, train.batch_size, processes)
    if processes > 1 and not train.only_own_text:
        require_tokens(models.recipe.data, models.recipe.data.train_tokens, processes)
    if processes == 1 or train.shard == "none":
        return
    shards_in_node(train.shard_within == "node")
    if train.shard in ("student", "both"):
        require_blocks(planned_model(models.student))
    if train.shard in ("teacher", "both"):
        for config in (models.teacher, *models.teachers):
            require_plan(config, "teacher")


def require_tokens(section: DataRecipe, tokens: int | None, processes: int) -> None:
    """Raise RecipeError if so many training tokens cannot fill a window for each process."""
    if tokens is None:
        return
    texts = all(isinstance(source, CorpusSource | TextSource) for source in section.sources)
    packed = section.packing == "isolated"
    most = most_windows(tokens, section.context, packed=packed, splittable=texts)
    require_windows(most, processes, at_most=True)


def ready_to_train(job: Job, stages: Mapping[str, Stage], *_: object) -> Job:
    """Apply `with_shard` once the data exists. Raises RecipeError like `require_text_for_all`."""
    require_text_for_all(job.recipe, job.recipe.train, stages["data"])
    return with_shard(job)


def require_text_for_all(recipe: RunRecipe, train: TrainRecipe, data: Stage) -> None:
    """Raise RecipeError if training has yet to run and there are more processes than windows."""
    processes = world_size()
    if processes > 1 and not train.only_own_text and not has_finished(recipe, "train"):
        require_windows(len(open_data(data)[0]), processes)


SOME_TOKENS = 2**53
"""A stand-in for an unknown length of the text: memory does not depend on it."""

FEW_STEPS = 10
"""The number of optimizer steps below which `check` warns."""

FindModels = Callable[[Job], Sequence[RunModels]]


def one_student(job: Job) -> list[RunModels]:
    return [run_models(job)]


def check_resources(check: Check, find: FindModels = one_student) -> Iterator[Finding]:
    """Estimate the student's size, and the stages' time and memory on this machine.

    find: returns the run's students. Raises StillhouseError like `plan_stages`.
    """
    if TOKENS not in check.found:
        return
    job: Job = check.job
    recipe, tokens = job.recipe, int(check.found[TOKENS])
    planned = find(job)
    yield _student_size(planned[0])
    tokens -= 0 if recipe.data.heldout_sources else recipe.data.heldout_tokens
    tokens = max(1, min(tokens, recipe.data.train_tokens or tokens))
    for models in planned:
        yield from check_calibration(models, tokens)
    machine = this_machine(recipe.train.products, timed=True)
    stages = [stage for models in planned for stage in plan_stages(models, machine, tokens)]
    trainings = [stage for stage in stages if stage.name.endswith("train")]
    yield from _signals(job, planned[0], machine, tokens, trainings[0].tokens / tokens)
    for stage in trainings:
        yield _training(stage, machine, job.precision.reason)
        steps = stage.tokens // (recipe.train.batch_size * recipe.data.context)
        if steps < FEW_STEPS:
            yield Finding(
                "warning",
                "training",
                f"a student learns little from {steps:,} optimizer step{'s' * (steps != 1)}",
                "raise train.epochs, lower train.batch_size, or add text",
            )
    tokenizer = load_tokenizer(job.tokenizer)
    prompts = own_prompts(job, tokenizer)
    windows = max(1, -(-tokens // recipe.data.context))
    for models in planned:
        yield from own_text_findings(models, machine, windows, prompts)
    yield from _memory(stages, machine)


def require_resources(job: Job, find: FindModels = one_student) -> Iterator[Finding]:
    """Check disk space, memory, processes, and what `train.on_policy` needs.

    Raises StillhouseError like `plan_stages`, `require_processes`, and `require_on_policy`.
    """
    yield from require_on_policy(job)
    planned = [one for one in find(job) if not has_finished(one.recipe, "train")]
    yield from require_disk(job, planned)
    for models in planned:
        require_processes(models)
    if job.family is not None:
        _require_scratch(job.family)
    yield from _require_memory(job, planned)


def _require_scratch(family: Recipe) -> None:
    """Raise RecipeError like `require_tokens`, for the training from random weights."""
    section = None if family.cascade is None else family.cascade.from_scratch
    if section is not None and world_size() > 1 and not has_finished(family, "scratch"):
        require_tokens(family.data, section.tokens, world_size())


def _require_memory(job: Job, planned: Sequence[RunModels]) -> Iterator[Finding]:
    """Yield an error if the student cannot be built or trained here, even allowing for the
    margin."""
    machine = this_machine(job.recipe.train.products, timed=False)
    for models in planned:
        if is_small(models, machine):
            continue
        tokens = models.recipe.data.train_tokens or SOME_TOKENS
        # An estimate of too few windows is not an error here: `require_processes` checks a bound.
        tokens = max(tokens, machine.processes * models.recipe.data.context)
        stages = plan_stages(models, machine, tokens)
        for finding in _memory(stages, machine):
            if finding.level == "error":
                yield finding


def _student_size(models: RunModels) -> Finding:
    student, teacher = config_size(models.student), config_size(models.teacher)
    text = (
        f"{student.parameters / 1e6:,.1f}M parameters "
        f"({student.parameters / teacher.parameters:.0%} of the teacher's "
        f"{teacher.parameters / 1e6:,.1f}M), {(student.parameters - student.ends) / 1e6:,.1f}M "
        "without embeddings"
    )
    return Finding("estimate", "student", text)


def _training(stage: StageEstimate, machine: Machine, precision: str) -> Finding:
    time, rate = stage.seconds(machine), machine.rate
    assert time is not None
    assert rate is not None
    text = f"{stage.note}: {count(stage.tokens)} tokens, {(stage.flops or 0) / 1e12:,.0f} TFLOP, "
    text += f"about {seconds(time)} at {rate * machine.processes / 1e9:,.0f} GFLOP/s ({precision})"
    return Finding("estimate", "training", text)


def _memory(stages: Iterable[StageEstimate], machine: Machine) -> Iterator[Finding]:
    """Report the memory of every stage that may not fit, or else of the largest stage."""
    stages = [stage for stage in stages if stage.memory.parts]
    doubtful = [stage for stage in stages if not stage.memory.fits(machine.memory)]
    largest = max(stages, key=lambda stage: stage.memory.total)
    for stage in doubtful or [largest]:
        memory, fix = stage.memory, stage.fix or "free some memory, or use a machine with more"
        text = f"{stage.name} needs about {size(memory.total)} per process: {memory}; "
        text += f"{size(machine.memory)} are available"
        if memory.fits(machine.memory):
            yield Finding("estimate", "memory", text)
        elif memory.cannot_fit(machine.memory) and not stage.name.endswith("evaluate"):
            text += f", which is too little even with a margin of {percent(MARGIN)}"
            yield Finding("error", "memory", text, fix)
        else:
            yield Finding("warning", "memory", f"{text}: it may not fit", fix)


def _signals(
    job: Job, models: RunModels, machine: Machine, tokens: int, passes: float
) -> Iterator[Finding]:
    """Report what a signal store costs and saves. passes: how often each token is trained on."""
    section = job.recipe.signals
    if section is not None and section.store is not None:
        manifest = read_manifest(job.base / section.store)
        kind = manifest.settings.encoding.kind
        text = f"{section.store}: {manifest.rows:,} tokens of kind {kind}, recorded earlier"
        yield Finding("ok", "signals", text)
        return
    if section is not None and section.answers is not None:
        text = "the log-probabilities that the API returns with its answers"
        if planned_objective(full_job(job)).chunks:
            text += ", as likelihoods of the text between its tokens and the student's"
        yield Finding("ok", "signals", text)
        return
    student, teacher = config_size(models.student).active, config_size(models.teacher).active
    rate = machine.rate or 1.0
    once = account.forward_flops(teacher, tokens) / rate  # seconds to score every token
    stored = size(tokens * models.row_bytes)
    faster = f"{1 + teacher / (3 * student):.1f} times as fast"
    if section is not None and not section.local:
        scorer = "vLLM" if section.server is None else section.server.base_url
        yield Finding("estimate", "signals", f"{scorer} scores the text; {stored} are stored")
    elif section is not None:
        text = f"the teacher scores the text once (about {seconds(once)}); {stored} are stored"
        if passes < 2:
            text += f"; this pays off from the second student or epoch on, which trains {faster}"
        else:
            text += f"; this saves about {seconds((passes - 1) * once)} over {passes:.0f} epochs"
        yield Finding("estimate", "signals", text)
    elif passes >= 2:
        text = f"the teacher scores the same text {passes:.0f} times"
        saved = seconds((passes - 1) * once)
        fix = f"add `signals: {{}}` to score it once, which saves about {saved} and takes {stored}"
        yield Finding("estimate", "signals", text, fix)
    else:
        text = (
            f"the teacher scores live; with `signals: {{}}` ({stored}), a second student or epoch "
            f"trains {faster}"
        )
        yield Finding("estimate", "signals", text)
