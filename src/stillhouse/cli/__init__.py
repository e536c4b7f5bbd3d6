"""The command line: each verb reads a recipe and calls the library. Heavy imports stay inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import __version__
from stillhouse.cli.exits import end_stopped, end_with, open_standard_streams
from stillhouse.cli.init_command import init
from stillhouse.cli.options import (
    JsonOption,
    RecipeArgument,
    SetOption,
    YesOption,
    agree,
    keep_imports,
    output_file,
    quoted,
    say,
)
from stillhouse.cli.signals_commands import signals
from stillhouse.cli.stop_signals import (
    Stopped,
    hold_further_signals,
    ignore_further_signals,
    raise_on_signals,
    received,
)
from stillhouse.cli.watch_command import watch
from stillhouse.errors import in_one_line
from stillhouse.launch import leads, leave_others

if TYPE_CHECKING:
    from stillhouse.pipeline.kind import RunResult

app = typer.Typer(
    name="stillhouse",
    help="Distill language models: train a small student to reproduce a large teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(signals, name="signals")

FOR_ALL_PROCESSES = ("run", "cascade", "signals", "synthesize", "evaluate")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"stillhouse {__version__}")
        raise typer.Exit


@app.callback()
def only_main_process(
    context: typer.Context,
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Under torchrun, run single-process commands in the main process only."""
    if context.invoked_subcommand in FOR_ALL_PROCESSES:
        return
    if not leads():
        raise typer.Exit
    leave_others()


@app.command()
def run(recipe: RecipeArgument, set_: SetOption = None, yes: YesOption = False) -> None:
    """Run every unfinished stage of a recipe; print a metrics table and the report's path.

    Example: `stillhouse run recipes/demo.yaml --set train.learning_rate=1e-4`

    On many GPUs: `torchrun --nproc-per-node 8 -m stillhouse run recipe.yaml`
    """
    from stillhouse.commands import run as run_recipe
    from stillhouse.evaluation.metrics import metrics_of
    from stillhouse.evaluation.metrics_table import to_rich
    from stillhouse.report.page import steps_table
    from stillhouse.terminal import Terminal

    keep_imports()
    agree(recipe, set_, yes)
    result = run_recipe(recipe, overrides=set_ or [])
    if result is None:
        return
    steps = steps_table(result.report)
    Terminal().print(to_rich(steps or metrics_of(result.evaluation)))
    for name, member in (result.members or {"model": result}).items():
        Terminal().write_line(f"{name:<7} {in_one_line(member.model)}")
    Terminal().write_line(f"report  {in_one_line(result.report)}")
    Terminal().write_line(f"next    {_next_command(result)}")


def _next_command(result: RunResult) -> str:
    """The command to try next with a run's model."""
    from stillhouse.kinds import KINDS

    if next(kind for kind in KINDS if kind.name == result.kind).predictor is not None:
        return f"stillhouse predict {quoted(result.folder)}   # reads texts"
    runs = quoted(result.folder.parent)
    return f"stillhouse watch {runs}   # chat with the student and its teacher"


@app.command(hidden=True)
def cascade(recipe: RecipeArgument, set_: SetOption = None, yes: YesOption = False) -> None:
    """Run a recipe with a cascade; the same as `stillhouse run`."""
    run(recipe, set_, yes)


@app.command()
def synthesize(recipe: RecipeArgument, set_: SetOption = None, yes: YesOption = False) -> None:
    """Generate a teacher's answers to the recipe's prompts, as chat JSONL that `data` reads.

    Never repeats a request that an earlier run sent. `stillhouse run` includes this step.

    Example: `stillhouse synthesize recipe.yaml --set synthesize.prompts.limit=20`
    """
    from rich.table import Table

    from stillhouse.commands import synthesize_text
    from stillhouse.terminal import Terminal

    keep_imports()
    agree(recipe, set_, yes, synthesize=True)
    result = synthesize_text(recipe, set_ or [])
    if result is None:
        return
    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, value in result.lines():
        table.add_row(name, value)
    Terminal().print(table)


@app.command()
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    calls: Annotated[
        int,
        typer.Option(
            help="Send this many requests to a text teacher to estimate the cost.",
            min=0,
            max=10_000,
        ),
    ] = 0,
) -> None:
    """Check a recipe before spending anything; estimate memory, tokens, time, and cost.

    Exits with status 1 if anything would fail.

    Example: `stillhouse check recipes/demo.yaml`
    """
    from stillhouse.check import check_recipe, findings_table
    from stillhouse.terminal import Terminal

    findings = check_recipe(recipe, set_ or [], calls=calls)
    Terminal().print(findings_table(findings))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeArgument,
    gpu_memory: Annotated[str, typer.Option(help="Memory per GPU, such as 80GB.")],
    gpus: Annotated[int, typer.Option(help="GPUs per node.", min=1, max=1024)] = 1,
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1, max=10_000)] = 1,
    rate: Annotated[
        float | None,
        typer.Option(help="TFLOP/s per GPU in training, to estimate the time.", min=1e-3),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Dollars per GPU-hour, to estimate the cost.", min=0)
    ] = None,
    json_: JsonOption = None,
    set_: SetOption = None,
) -> None:
    """Plan a run on hardware you need not have: memory, time, cost, disk, and network.

    Reads only the models' configurations. Exits with status 1 if anything does not fit.

    Example: `stillhouse plan recipe.yaml --gpus 8 --gpu-memory 80GB --rate 400`
    """
    from stillhouse.plan import described_machine, plan_recipe, plan_table
    from stillhouse.terminal import Terminal

    machine = described_machine(gpus, gpu_memory, nodes, rate, price_per_hour)
    found = plan_recipe(recipe, machine, set_ or [])
    Terminal().print(plan_table(found))
    if json_ is not None:
        found.save(json_)
    if not found.fits:
        raise typer.Exit(1)


@app.command()
def preview(
    recipe: RecipeArgument,
    rows: Annotated[int, typer.Option(help="Number of windows to show.", min=1, max=10_000)] = 3,
    set_: SetOption = None,
) -> None:
    """Show training windows colored by loss mask; for a task, the teacher's prompts.

    Example: `stillhouse preview recipes/demo.yaml --rows 2`
    """
    from stillhouse.commands import preview_recipe
    from stillhouse.terminal import Terminal

    Terminal().print(preview_recipe(recipe, set_ or [], rows=rows))


@app.command()
def evaluate(
    recipe: RecipeArgument,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model to measure; by default, the run's `model` or, without that export, its "
            "`checkpoint`."
        ),
    ] = None,
    json_: JsonOption = None,
    set_: SetOption = None,
) -> None:
    """Measure a model against the recipe's teacher, on the recipe's held-out text.

    Example: `stillhouse evaluate recipes/demo.yaml --model runs/demo/checkpoint`

    On many GPUs: `torchrun --nproc-per-node 8 -m stillhouse evaluate recipe.yaml`
    """
    from stillhouse.commands import evaluate_model
    from stillhouse.evaluation.metrics import metrics_of
    from stillhouse.evaluation.metrics_table import to_rich
    from stillhouse.terminal import Terminal

    keep_imports()
    evaluation = evaluate_model(recipe, set_ or [], model)
    if not leads():
        return
    Terminal().print(to_rich(metrics_of(evaluation)))
    if json_ is not None:
        evaluation.save(json_)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Output file; by default, the run's report.", callback=output_file),
    ] = None,
) -> None:
    """Render a finished run's report again from its stored data.

    Example: `stillhouse report runs/demo --out report.html`
    """
    from stillhouse.report.page import redraw_report
    from stillhouse.terminal import Terminal

    Terminal().write_line(f"report  {in_one_line(redraw_report(folder, out))}")


app.command()(watch)


@app.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A run folder, stage, store, export, checkpoint, or journal.", exists=True
        ),
    ],
) -> None:
    """Read every file in a folder and list damaged ones. Exits with status 1 if there are any.

    Example: `stillhouse verify runs/demo`
    """
    from stillhouse.terminal import Terminal
    from stillhouse.verify_folder import verify_folder

    damaged = False
    for found in verify_folder(folder):
        for problem in found.problems:
            say(f"error: {found.kind} {in_one_line(found.path)}: {problem}")
        if not found.problems:
            Terminal().write_line(f"sound   {found.kind:<10} {in_one_line(found.path)}")
        damaged = damaged or bool(found.problems)
    if damaged:
        raise typer.Exit(1)


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="A task's run folder, or its model.")],
    texts: Annotated[
        str,
        typer.Argument(
            help="A file, folder, or pattern with one text per row; - reads standard input, a text "
            "or a JSON object per line."
        ),
    ] = "-",
    text_key: Annotated[
        str, typer.Option("--text", help="The column or key that holds the text.")
    ] = "text",
) -> None:
    """Label or answer texts with a task's student; print one JSON line per text, in order.

    Example: `echo "my card never came" | stillhouse predict runs/classify`
    """
    from stillhouse.commands import find_predictor
    from stillhouse.tasks.labeled_texts import arriving_texts, file_texts
    from stillhouse.terminal import json_line, write_output

    predictor = find_predictor(folder)
    file = None if texts == "-" else file_texts(Path(texts), text_key)
    for group in arriving_texts(sys.stdin, text_key) if file is None else [file]:
        for row in predictor(group):
            write_output(json_line(row))


app.command()(init)


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for completion and validation in an editor.

    Example: `stillhouse schema > recipes/recipe.schema.json`
    """
    import json

    from stillhouse.config.load_recipe import recipe_json_schema
    from stillhouse.terminal import write_output

    write_output(json.dumps(recipe_json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """Show versions, what this CPU and GPU can do, and which extras are missing.

    Example: `stillhouse doctor`
    """
    from stillhouse.doctor import examination
    from stillhouse.terminal import Terminal

    Terminal().print(examination())


def main() -> None:
    """Run the command line: user errors print one message, Ctrl-C stops cleanly, and anything
    else is a bug."""
    open_standard_streams()
    raise_on_signals()
    try:
        app()
    except Stopped as stopped:
        hold_further_signals()
        end_stopped(stopped.number)
    except Exception as error:
        hold_further_signals()
        # A library may have replaced the signal's exception with one of its own.
        if (number := received()) is not None:
            end_stopped(number)
        end_with(error)
    finally:
        ignore_further_signals()
