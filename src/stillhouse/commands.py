"""The commands' implementations: each reads a recipe and walks through its kind of run's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from stillhouse.checksums import require_sound_export
from stillhouse.config.load_recipe import (
    AnyRecipe,
    load_language_model_recipe,
    load_recipe,
    read_recipe,
)
from stillhouse.data.windows import Windows
from stillhouse.errors import ModelError, RecipeError
from stillhouse.evaluation.evaluate import evaluate
from stillhouse.evaluation.results import Evaluation
from stillhouse.family.members import first_member
from stillhouse.hardware import tune_allocator
from stillhouse.kinds import KINDS, kind_of
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.evaluate_stage import evaluation_arguments
from stillhouse.language_model.job import Job
from stillhouse.language_model.language_model import CHECKPOINT, DATA_STEPS, LANGUAGE_MODEL
from stillhouse.language_model.recipe import Recipe
from stillhouse.language_model.signals_stage import STORE
from stillhouse.language_model.synthesis_check import require_text_teacher, synthesis_spending
from stillhouse.language_model.synthesis_stage import complete_text, follow_text, require_text
from stillhouse.language_model.vocabulary_stage import find_job
from stillhouse.launch import leads
from stillhouse.pipeline.engine import (
    followed_folder,
    following,
    locked_folder,
    require,
    run_folder,
    run_kind,
    run_steps,
    stages_of,
)
from stillhouse.pipeline.kind import Rows, RunResult
from stillhouse.pipeline.shared_folder import leading
from stillhouse.pipeline.stage_plan import doing
from stillhouse.signals.signals_config import FrozenHeadSignals
from stillhouse.synthesis.synthesize import Synthesis
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.source_tokenizers import shared_vocabulary
from stillhouse.training.train import MODEL


def run(
    recipe: AnyRecipe | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> RunResult | None:
    """Run every unfinished stage of a recipe of any kind.

    recipe: a path, a dictionary, or a recipe object. base: the folder that relative paths in the
    recipe refer to; by default, the recipe file's folder, or the working directory.

    Under torchrun, every process calls this; the main process gets the result, the others None.
    Raises StillhouseError; finished stages are kept.
    """
    recipe, base = read_recipe(recipe, overrides, base)
    return run_kind(kind_of(recipe), recipe, base)


def preview_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, rows: int = 3
) -> RenderableType:
    """Render the first rows of a recipe's text as the student or the teacher reads them."""
    recipe, base = load_recipe(path, overrides), Path(path).parent
    return kind_of(recipe).preview(recipe, base, rows)


def find_predictor(folder: Path) -> Callable[[Iterable[str]], Rows]:
    """Return a function from texts to a task model's predictions, in order.

    folder: a run folder or a model in it. Raises ModelError if there is no such model.
    """
    for candidate in (folder, folder / MODEL):
        require_sound_export(candidate)
        for kind in KINDS:
            predictor = kind.predictor and kind.predictor(candidate)
            if predictor is not None:
                return predictor
    raise ModelError(
        "this folder contains no task model",
        where=folder,
        fix="pass the run folder of a recipe with `task`, after `stillhouse run`",
    )


# --- before money is spent -------------------------------------------------------------------


def agree_to_spend(
    recipe: AnyRecipe | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    base: Path | None = None,
    synthesize: bool = False,
    confirm: Callable[[str], bool] | None = None,
) -> bool:
    """Ask for confirmation before spending without a budget; True if the command may continue.

    synthesize: whether the command is `stillhouse synthesize` rather than `run`. confirm: shows a
    question and returns the answer; None if there is no terminal, in which case RecipeError is
    raised instead of asking.
    """
    recipe, base = read_recipe(recipe, overrides, base)
    if synthesize and not isinstance(recipe, Recipe):
        return True  # `synthesize_text` rejects the recipe of a task
    kind = kind_of(recipe)
    job = kind.find_to_check(recipe, base)
    if synthesize:
        unlimited = list(synthesis_spending(job, complete=True))
    else:
        spending = [step.spending for step in kind.steps if step.spending is not None]
        unlimited = [line for each in spending for line in each(job)]
    if not unlimited:
        return True
    lines = "; ".join(unlimited)
    if confirm is None:
        raise RecipeError(
            f"this would spend on an API without a limit: {lines}",
            where="budget",
            fix="set max_usd or max_tokens in the budgets of the teacher and the judge, or pass "
            "--yes to spend without a limit",
        )
    return confirm(f"{lines}. There is no budget. Send the requests?")


# --- parts of a language-model run -----------------------------------------------------------


def prepare_data(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Job, Windows, Windows]:
    """Run a recipe's data stage unless it is finished; return the job, the training windows, and
    the held-out windows. Under torchrun, every process calls this.

    Raises DataError if the text has yet to be synthesized, because that can cost money.
    """
    recipe, base = first_member(load_language_model_recipe(path, overrides)), Path(path).parent
    require_text(recipe, base)
    with stages_of(recipe) as do:
        job, stages = run_steps(LANGUAGE_MODEL, find_job(recipe, base), do, only=DATA_STEPS)
    return job, *open_data(stages["data"])


def record_signals(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run a recipe's signals stage unless it is finished; return the store's folder.

    Raises RecipeError if the recipe has no `signals`.
    """
    recipe, base = first_member(load_language_model_recipe(path, overrides)), Path(path).parent
    section = recipe.signals
    if section is None or section.store is not None:
        raise RecipeError(
            "this recipe records no signals",
            where=path,
            fix="add `signals: {}`, or pass --set signals.encoding.kind=threshold"
            if section is None
            else "remove signals.store, or pass --set signals.store=null",
        )
    folder = run_folder(recipe)
    only: tuple[str, ...] = (*DATA_STEPS, "signals")
    if isinstance(section.encoding, FrozenHeadSignals):
        only += ("search", "student")  # the store is made for this student's head
    with stages_of(recipe) as do:
        if leads():
            folder.require_free("signals")
        job = find_job(recipe, base, weights=section.needs_weights)
        _, stages = run_steps(LANGUAGE_MODEL, job, do, only=only)
        if leads():
            folder.point("signals", stages["signals"].path / STORE)
    return folder.root / "signals"


def synthesize_text(path: str | Path, overrides: Sequence[str] = ()) -> Synthesis | None:
    """Run a recipe's `synthesize` section without repeating answered requests. Under torchrun,
    every process calls this; the main process gets the result, the others None.

    Raises RecipeError if the recipe has no such section.
    """
    recipe = load_language_model_recipe(path, overrides)
    if recipe.synthesize is None:
        raise RecipeError(
            "this recipe synthesizes nothing",
            where=path,
            fix="add a `synthesize` section (docs/synthesis.md)",
        )
    base = Path(path).parent
    if not leads():
        with followed_folder(recipe) as folder:
            follow_text(recipe, base, following(folder))
        return None
    with leading(run_folder(recipe).root, locked_folder(recipe)) as folder:
        require(require_text_teacher(recipe, base))
        return complete_text(recipe, base, folder, doing(folder))


def evaluate_model(
    path: str | Path, overrides: Sequence[str] = (), model: str | None = None
) -> Evaluation:
    """Evaluate a model against the recipe's teacher. Under torchrun, every process calls this; only
    the main process's result is complete.

    model: None: the run's exported model or, if it exports none in safetensors, its trained student
    in float32. Raises ModelError if the model is missing or its vocabulary differs from the
    teacher's.
    """
    tune_allocator()
    if model is None:
        model = str(_own_model(path, overrides))
    job, _, heldout = prepare_data(path, overrides)
    source = resolve_model(model, base=Path.cwd(), trusted=job.start.trusted)
    return evaluate(
        {"teacher": job.teacher, "student": source},
        vocabulary=shared_vocabulary(job.tokenizer, source).rows,
        **evaluation_arguments(job, job.recipe.measured, heldout),
    )


def _own_model(path: str | Path, overrides: Sequence[str]) -> Path:
    """The model in a recipe's run folder that `evaluate` measures by default. Raises ModelError."""
    recipe = load_language_model_recipe(path, overrides)
    root = run_folder(recipe).root
    if recipe.cascade is not None:
        last = root / recipe.cascade.hops[-1].name / CHECKPOINT
        raise ModelError(
            "a family has several models",
            where=root,
            fix=f"name one, for example with --model {last}",
        )
    found = next((root / name for name in (MODEL, CHECKPOINT) if (root / name).exists()), None)
    if found is None:
        raise ModelError(
            "this recipe has no finished model yet",
            where=root,
            fix=f"pass a model with --model, or run `stillhouse run {path}` first",
        )
    return found
