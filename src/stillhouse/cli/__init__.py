"""The command line: each verb reads a recipe and calls the library. Heavy imports stay inside."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.cli.options import RecipeArgument, SetOption, YesOption, agree, say
from stillhouse.cli.signals_commands import signals
from stillhouse.errors import StillhouseError

if TYPE_CHECKING:
    from stillhouse.answering.answering_config import AnsweringRecipe
    from stillhouse.classify.classify_config import ClassifyRecipe
    from stillhouse.evaluate.results import Evaluation

app = typer.Typer(
    name="stillhouse",
    help="Distill language models: a small student learns to reproduce a large teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(signals, name="signals")


@app.command()
def run(recipe: RecipeArgument, set_: SetOption = None, yes: YesOption = False) -> None:
    """Does every stage of a recipe that is not done yet, and ends with a table and a report.

    Example: `stillhouse run recipes/demo.yaml --set train.learning_rate=1e-4`

    On many GPUs: `torchrun --nproc-per-node 8 -m stillhouse run recipe.yaml`
    """
    from rich.console import Console

    from stillhouse.config.load import load_any_recipe
    from stillhouse.config.recipe import Recipe
    from stillhouse.runner import run as run_recipe

    loaded = load_any_recipe(recipe, set_ or [])
    if not isinstance(loaded, Recipe):
        _run_task(loaded, recipe, yes)
        return
    if loaded.cascade is not None:
        cascade(recipe, set_, yes)
        return
    agree(recipe, set_, yes)
    result = run_recipe(recipe, overrides=set_ or [])
    if result is None:
        return
    _print_evaluation(result.evaluation)
    Console().print(f"model   {result.model}\nreport  {result.report}", highlight=False)


@app.command()
def synthesize(recipe: RecipeArgument, set_: SetOption = None, yes: YesOption = False) -> None:
    """Has a teacher answer the recipe's prompts, and writes a chat JSONL that `data` reads.

    What was answered before, by whichever run, is not asked again. `stillhouse run` does this too.

    Example: `stillhouse synthesize recipe.yaml --set synthesize.prompts.limit=20`
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from stillhouse.runner import synthesize_text

    agree(recipe, set_, yes, command="synthesize")
    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, value in synthesize_text(recipe, set_ or []).lines():
        table.add_row(name, escape(value))
    Console().print(table)


@app.command()
def cascade(recipe: RecipeArgument, set_: SetOption = None, yes: YesOption = False) -> None:
    """Makes a family: prunes and distills in turn, each student the start of the next smaller one.

    Example: `stillhouse cascade recipes/cascade.yaml`
    """
    from rich.console import Console

    from stillhouse.cascade import run_cascade

    agree(recipe, set_, yes)
    result = run_cascade(recipe, overrides=set_ or [])
    if result is None:
        return
    for name, member in result.members.items():
        Console().print(f"[bold]{name}[/]  {member.model}", highlight=False)
        _print_evaluation(member.evaluation)
    Console().print(f"report  {result.report}", highlight=False)


@app.command()
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    calls: Annotated[
        int,
        typer.Option(help="Requests to make of a teacher, to tell what the rest costs.", min=0),
    ] = 0,
) -> None:
    """Checks a recipe before anything is spent, and estimates memory, tokens, time and cost.

    Exit status 1 when something would fail.

    Example: `stillhouse check recipes/demo.yaml`
    """
    from rich.console import Console

    from stillhouse.check import check_recipe, findings_table

    findings = check_recipe(recipe, set_ or [], calls=calls)
    Console().print(findings_table(findings))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def preview(
    recipe: RecipeArgument,
    rows: Annotated[int, typer.Option(help="Windows to show.", min=1)] = 3,
    set_: SetOption = None,
) -> None:
    """Shows some training windows, colored by loss mask: what the student is asked to predict.

    Of a recipe with `task`: what the teacher reads.

    Example: `stillhouse preview recipes/demo.yaml --rows 2`
    """
    from rich.console import Console

    from stillhouse.answering.answering_config import AnsweringRecipe
    from stillhouse.classify.classify_config import ClassifyRecipe
    from stillhouse.config.load import load_any_recipe
    from stillhouse.data.preview import preview as render
    from stillhouse.runner import prepare_data
    from stillhouse.teachers.load import load_tokenizer

    loaded = load_any_recipe(recipe, set_ or [])
    if isinstance(loaded, AnsweringRecipe):
        from stillhouse.answering.answering_check import preview_answers

        Console().print(preview_answers(loaded, recipe.parent, rows))
        return
    if isinstance(loaded, ClassifyRecipe):
        from stillhouse.classify.classify_check import preview_task

        Console().print(preview_task(loaded, recipe.parent, rows))
        return
    job, windows, _ = prepare_data(recipe, set_ or [])
    Console().print(render(windows, load_tokenizer(job.tokenizer_path), rows))


@app.command()
def evaluate(
    recipe: RecipeArgument,
    model: Annotated[
        str | None, typer.Option(help="A model to measure; by default the run's own.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Measures a model against the recipe's teacher, on the recipe's held-out text.

    Example: `stillhouse evaluate recipes/demo.yaml --model runs/demo/model`
    """
    from stillhouse.runner import evaluate_model

    evaluation = evaluate_model(recipe, set_ or [], model)
    _print_evaluation(evaluation)
    if json_ is not None:
        evaluation.save(json_)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; by default the run's own.")
    ] = None,
) -> None:
    """Draws a finished run's report again, from its stored figures.

    Example: `stillhouse report runs/demo --out report.html`
    """
    from rich.console import Console

    from stillhouse.report.answers_page import AnswersReport, write_answers_report
    from stillhouse.report.classifier_page import ClassifierReport, write_classifier_report
    from stillhouse.report.report_data import ReportData
    from stillhouse.report.write import write_report

    target = out or (folder / "report.html").resolve()
    stored = (folder / "report.html").resolve().with_name("report.json")
    if (folder / "model" / "classifier.json").is_file():
        write_classifier_report(ClassifierReport.load(stored), target)
    elif (folder / "model" / "answering.json").is_file():
        write_answers_report(AnswersReport.load(stored), target)
    else:
        write_report(ReportData.load(stored), target)
    Console().print(f"report  {target}", highlight=False)


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="The run folder of a task, or its model.")],
    texts: Annotated[
        str, typer.Argument(help="A file with a text in each row; - is standard input.")
    ] = "-",
    text_key: Annotated[
        str, typer.Option("--text", help="The column or key that holds the text.")
    ] = "text",
) -> None:
    """Labels or answers texts with a task's student; writes a JSON line for each, in their order.

    Example: `echo "my card never came" | stillhouse predict runs/classify`
    """
    import json

    from stillhouse.answering.predict_answers import answers_folder, predicted_answers
    from stillhouse.classify.predict_labels import (
        file_texts,
        open_classifier,
        predictions,
        stream_texts,
    )

    source = stream_texts(sys.stdin, text_key) if texts == "-" else None
    source = source or file_texts(Path(texts), text_key)
    student = answers_folder(folder)
    if student is None:
        rows = predictions(open_classifier(folder), source)
    else:
        rows = predicted_answers(student, source)
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False))


@app.command()
def init(
    job: Annotated[str | None, typer.Option(help="distill, classify, extract or generate.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A model, as teacher.model, or the URL of an API.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A file with a text in each row.")] = None,
    size: Annotated[
        str | None, typer.Option(help="small, medium, large; or a model to start from.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The recipe that is written.")] = None,
    logs: Annotated[
        Path | None, typer.Option("--from", help="Logs of chat completions, JSONL.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="classify: with commas between.")] = None,
    fields: Annotated[str | None, typer.Option(help="extract: with commas between.")] = None,
    api_model: Annotated[str | None, typer.Option(help="The API's name of the model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
) -> None:
    """Writes a recipe out of five answers, or out of logs that show the job.

    It asks what no flag says.

    Example: `stillhouse init --from logs.jsonl --out recipe.yaml`
    """
    from rich.console import Console

    from stillhouse.init_answers import wishes
    from stillhouse.init_recipe import write_draft

    given = {"job": job, "teacher": teacher, "data": data, "size": size, "out": out}
    given |= {"labels": labels, "fields": fields, "api_model": api_model}
    wish = wishes(given, lambda question, default: typer.prompt(question, default=default), logs)
    for path in write_draft(wish, force=force):
        Console().print(f"wrote   {path}", highlight=False)
    Console().print(f"next    stillhouse check {wish.out}", highlight=False)


@app.command()
def schema() -> None:
    """Prints the recipe's JSON Schema, for completion and checks in an editor.

    Example: `stillhouse schema > recipes/recipe.schema.json`
    """
    import json

    from stillhouse.config.load import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """Shows versions, what this CPU and GPU can do, and what is missing for which extra.

    Example: `stillhouse doctor`
    """
    from rich.console import Console

    from stillhouse.doctor import examination

    Console().print(examination())


def _run_task(loaded: ClassifyRecipe | AnsweringRecipe, path: Path, yes: bool) -> None:
    from rich.console import Console, RenderableType

    from stillhouse.answering.answering_config import AnsweringRecipe
    from stillhouse.answering.answering_run import AnsweringResult, run_answering
    from stillhouse.answering.answers_table import answers_table
    from stillhouse.classify.classifier_table import classifier_table
    from stillhouse.classify.classify_run import TaskResult, run_task
    from stillhouse.consent import agree_to_task

    confirm = typer.confirm if sys.stdin.isatty() else None
    if not yes and not agree_to_task(loaded, path.parent, confirm):
        say("no request was sent")
        raise typer.Exit(1)
    result: TaskResult | AnsweringResult
    table: RenderableType
    if isinstance(loaded, AnsweringRecipe):
        result = run_answering(loaded, base=path.parent)
        table = answers_table(result.evaluation)
    else:
        result = run_task(loaded, base=path.parent)
        table = classifier_table(result.evaluation)
    Console().print(table)
    Console().print(f"model   {result.model}\nreport  {result.report}", highlight=False)


def _print_evaluation(evaluation: Evaluation) -> None:
    from rich.console import Console

    from stillhouse.evaluate.retention_table import retention_table, task_table

    tasks = task_table(evaluation)
    Console().print(retention_table(evaluation), *([tasks] if tasks else []))


def main() -> None:
    """Entry point: a user's error is one message, Ctrl-C a clean stop; other errors are bugs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except StillhouseError as error:
        say(f"error: {error}")
        sys.exit(1)
    except _Stopped:
        say("stopped. What is finished is kept: the same command goes on from there.")
        sys.exit(130)
    except MemoryError:
        say("error: out of memory\n  fix:   lower train.micro_batch_size or data.context")
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        import traceback

        traceback.print_exc()
        say(
            "error: this is a bug in Stillhouse, not in your recipe. What is finished is kept.\n"
            "  fix:   please report the lines above together with `stillhouse doctor`"
        )
        sys.exit(2)


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt, of which typer makes a silent exit."""


def _stop(number: int, frame: Any) -> None:
    raise _Stopped
