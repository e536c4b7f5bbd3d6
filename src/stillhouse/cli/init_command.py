"""The `init` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.options import answered, quoted
from stillhouse.errors import in_one_line


def init(
    job: Annotated[
        str | None, typer.Option(help="distill, classify, extract, or generate.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A model, as in teacher.model, or an API's URL.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file, folder, or pattern: text or chats to distill on, or one text per row for "
            "a task."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="small, medium, or large; or a model to start from.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Where to write the recipe.")] = None,
    logs: Annotated[
        Path | None,
        typer.Option("--from", help="Chat-completion logs to start from, JSONL or a JSON list."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels, separated by commas (classify).")
    ] = None,
    fields: Annotated[
        str | None, typer.Option(help="Fields, separated by commas (extract).")
    ] = None,
    api_model: Annotated[str | None, typer.Option(help="The model's name at the API.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a recipe from five answers, or from chat-completion logs.

    Asks for every answer that no flag provides.

    Example: `stillhouse init --from logs.jsonl --out recipe.yaml`
    """
    from stillhouse.init_answers import init_answers
    from stillhouse.init_recipe import write_recipe
    from stillhouse.terminal import Terminal

    given = {"job": job, "teacher": teacher, "data": data, "size": size, "out": out}
    given |= {"labels": labels, "fields": fields, "api_model": api_model}
    answers = init_answers(given, answered, logs, repeat=sys.stdin.isatty())
    for path in write_recipe(answers, force=force):
        Terminal().write_line(f"wrote   {in_one_line(path)}")
    Terminal().write_line(f"next    stillhouse check {quoted(answers.out)}")
