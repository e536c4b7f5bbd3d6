"""One run: the stages in order, each done once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.config.load import load_recipe, parse_recipe
from stillhouse.config.members import first_member
from stillhouse.config.recipe import Recipe
from stillhouse.data.windows import Windows
from stillhouse.errors import DataError, ModelError, RecipeError
from stillhouse.evaluate.evaluate import evaluate
from stillhouse.evaluate.results import Evaluation
from stillhouse.export.licenses import Origin
from stillhouse.hardware import choose_precision, default_device, leads, tune_allocator
from stillhouse.job import Job, shared_vocabulary
from stillhouse.run_paths import run_root
from stillhouse.runfolder import RunFolder, Stage
from stillhouse.stages import export_stage as shipping
from stillhouse.stages import search_stage as search
from stillhouse.stages import synthesis_stage as synthesis
from stillhouse.stages.api_signals_stage import answer_signals
from stillhouse.stages.evaluate_stage import EVALUATION, plan_evaluation
from stillhouse.stages.locked_folder import locked_folder
from stillhouse.stages.quantize_stage import plan_quantization, plan_quantized_training
from stillhouse.stages.report_stage import REPORT
from stillhouse.stages.signals_stage import STORE, for_one_head, plan_signals, stored_signals
from stillhouse.stages.stage_plan import Do, StagePlan, doing, open_data, telling
from stillhouse.stages.train_stage import plan_baseline, plan_student, plan_training
from stillhouse.stages.vocabulary_stage import begin
from stillhouse.synthesis.synthesize import Synthesis
from stillhouse.teachers.model_source import resolve_model
from stillhouse.training.train import MODEL

POLL_SECONDS = 0.5
SIGNALS = "signals"
"""The stage, and the link to its store in the run folder."""


@dataclass(frozen=True)
class RunResult:
    """Where a run's products are. model: the folder of the first format that is exported."""

    folder: Path
    model: Path
    report: Path
    evaluation: Evaluation
    stages: list[Stage]


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> RunResult | None:
    """Runs a recipe: a path, a dictionary or a `Recipe`. Finished stages are not done again.

    base: the folder that relative paths in the recipe start from; by default the recipe file's
    folder, or the working directory. Under torchrun every process calls this, and only the first
    gets a result; the others are None.
    Raises StillhouseError; what is finished by then stays.
    """
    recipe, base = read(recipe, overrides, base)
    if recipe.cascade is not None:
        raise RecipeError(
            "this recipe makes a family of students, not one",
            where="cascade",
            fix="call stillhouse.cascade.run_cascade, or remove the section",
        )
    if not leads():
        tune_allocator()
        follow(recipe, base, run_folder(recipe))
        return None
    with locked_folder(recipe) as folder:
        return lead(recipe, base, folder)


def prepare_data(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[Job, Windows, Windows]:
    """Does a recipe's data stage, or finds it done: the job, training and held-out windows.

    Raises DataError where its text is still to be synthesized, which may cost money.
    """
    loaded, base = read(recipe, overrides, None)
    loaded = first_member(loaded)
    folder = run_folder(loaded)
    with folder.locked():
        if synthesis.wanted(loaded, base):
            plan = synthesis.synthesis(loaded, base)
            if folder.finished(plan.name, plan.depends_on) is None:
                raise DataError(
                    "the text of this recipe is not synthesized yet",
                    where=recipe,
                    fix=f"stillhouse synthesize {recipe}",
                )
        job, data = begin(loaded, base, doing(folder))
        return job, *open_data(data)


def record_signals(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Does a recipe's signals stage, or finds it done: the folder of the store.

    Raises RecipeError where the recipe has no `signals`.
    """
    loaded, base = read(recipe, overrides, None)
    loaded = first_member(loaded)
    if loaded.signals is None or loaded.signals.store is not None:
        raise RecipeError(
            "this recipe records no signals",
            where=recipe,
            fix="add `signals: {}` to it, without a store, or "
            "--set signals.encoding.kind=threshold",
        )
    folder = run_folder(loaded)
    with folder.locked():
        # Of a teacher that a server runs, only the configuration and the tokenizer are needed.
        do, here = doing(folder), loaded.signals.server is None and loaded.signals.answers is None
        job, data = begin(loaded, base, do, weights=here)
        student = None
        if for_one_head(job):
            job = _shaped(job, data, do)
            student = do(plan_student(job, data))
        recorded = do(_recording(job, data, student))
        folder.point(SIGNALS, recorded.path / STORE)
        return folder.root / SIGNALS


def synthesize_text(recipe: str | Path, overrides: Sequence[str] = ()) -> Synthesis:
    """Does a recipe's `synthesize`: what is answered already is not asked again.

    Raises RecipeError where the recipe has no such section.
    """
    loaded, base = read(recipe, overrides, None)
    section = loaded.synthesize
    if section is None:
        raise RecipeError(
            "this recipe synthesizes nothing",
            where=recipe,
            fix="add the section `synthesize`, see docs/synthesis.md",
        )
    with locked_folder(loaded) as folder:
        return synthesis.again(loaded, base, folder, doing(folder))


def evaluate_model(
    recipe: str | Path, overrides: Sequence[str] = (), model: str | None = None
) -> Evaluation:
    """Measures a model, by default the run's own, beside the recipe's teacher.

    Raises ModelError where the model is missing or has another vocabulary than the teacher.
    """
    tune_allocator()
    job, _, heldout = prepare_data(recipe, overrides)
    own = run_folder(job.recipe).root / MODEL
    if model is None and not own.exists():
        raise ModelError(
            "this recipe has no finished model yet",
            where=own,
            fix=f"give one with --model, or do `stillhouse run {recipe}` first",
        )
    source = resolve_model(str(own) if model is None else model, base=Path.cwd())
    return evaluate(
        {"teacher": job.teacher.path, "student": source.path},
        section=job.recipe.evaluate,
        windows=heldout,
        seed=job.recipe.seed,
        vocabulary=shared_vocabulary(job.teacher, source, job.trust_remote_code).rows,
        precision=choose_precision(job.recipe.train.precision, default_device()),
        trust_remote_code=job.trust_remote_code,
    )


def read(
    recipe: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str], base: Path | None
) -> tuple[Recipe, Path]:
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides), base or Path(recipe).parent
    if not isinstance(recipe, Recipe):
        recipe = parse_recipe(dict(recipe), overrides=overrides)
    return recipe, base or Path.cwd()


def run_folder(recipe: Recipe) -> RunFolder:
    return RunFolder(run_root(recipe))


def lead(
    recipe: Recipe, base: Path, folder: RunFolder, ancestors: Sequence[Origin] = ()
) -> RunResult:
    """Every stage of a recipe, in a folder that is locked. ancestors: as in `shipping.export`."""
    finished: list[Stage] = []
    do = telling(folder, finished)
    job, data, student, trained, baseline, quantized = _stages_together(recipe, base, do)
    evaluated = do(plan_evaluation(job, data, student, trained, baseline, quantized))
    shipped = [trained, *quantized][-1]
    exported = do(shipping.export(job, data, shipped, evaluated, ancestors))
    hub = recipe.export.push_to_hub
    if hub is not None:
        do(shipping.push_exports(hub, exported, recipe.export.formats, recipe.name))
    report = do(shipping.report(job, list(finished)))
    for stage in finished:
        if stage.name == SIGNALS:
            folder.point(SIGNALS, stage.path / STORE)
        if stage.name == synthesis.NAME:
            folder.point(synthesis.NAME, stage.path)
    links = [shipping.shipped_folder(form) for form in recipe.export.formats]
    for name in links:
        folder.point(name, exported.path / name)
    folder.point(REPORT, report.path / REPORT)
    return RunResult(
        folder=folder.links,
        model=folder.links / links[0],
        report=folder.links / REPORT,
        evaluation=Evaluation.load(evaluated.path / EVALUATION),
        stages=finished,
    )


def _stages_together(
    recipe: Recipe, base: Path, do: Do
) -> tuple[Job, Stage, Stage, Stage, Stage | None, list[Stage]]:
    """The stages up to the last training, which every process goes through."""
    job, data = begin(recipe, base, do)
    job = _shaped(job, data, do)
    student = recorded = None
    if recipe.signals is not None and recipe.signals.store is None:
        if for_one_head(job):
            student = do(plan_student(job, data))
        recorded = do(_recording(job, data, student))
    student = student or do(plan_student(job, data))
    stored = stored_signals(job, recorded)
    trained = do(plan_training(job, data, student, stored))
    baseline = None
    if recipe.evaluate.fine_tuning_baseline:
        baseline = do(plan_baseline(job, data, student))
    quantized = []
    if recipe.quantize is not None:
        quantized.append(do(plan_quantization(job, data, trained)))
        if recipe.quantize.qat is not None:
            plan = plan_quantized_training(job, data, trained, quantized[0], stored)
            quantized.append(do(plan))
    return job, data, student, trained, baseline, quantized


def _recording(job: Job, data: Stage, student: Stage | None) -> StagePlan:
    """The stage that fills the store: a teacher is asked, or has told already."""
    if job.recipe.signals is not None and job.recipe.signals.answers is not None:
        return answer_signals(job)
    return plan_signals(job, data, student)


def _shaped(job: Job, data: Stage, do: Do) -> Job:
    """The job with the sizes of its student, which are searched for where there is a target."""
    if not search.wanted(job.recipe):
        return job
    return search.shaped(job, do(search.search(job, data)))


def follow(recipe: Recipe, base: Path, folder: RunFolder) -> Stage:
    """What the other processes of a torchrun do of a recipe; the finished training stage."""
    return _stages_together(recipe, base, taking_part(folder))[3]


def taking_part(folder: RunFolder) -> Do:
    """How the other processes of a torchrun do a stage: take part in it, or wait for it."""

    def do(plan: StagePlan) -> Stage:
        if plan.together and folder.finished(plan.name, plan.depends_on) is None:
            plan.work(folder.partial(plan.name, plan.depends_on))
        while (stage := folder.finished(plan.name, plan.depends_on)) is None:
            time.sleep(POLL_SECONDS)
        return stage

    return do
