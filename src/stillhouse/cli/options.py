"""What several verbs of the command line share: arguments, a question, a message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any recipe key; repeatable."),
]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Pay an API without a budget, and without being asked.")
]


def agree(
    recipe: Path,
    overrides: list[str] | None,
    yes: bool,
    *,
    command: Literal["run", "synthesize"] = "run",
) -> None:
    """Asks for consent before an API is paid without a budget; without a terminal, refuses."""
    from stillhouse.consent import agree_to_spend
    from stillhouse.hardware import leads

    if yes or not leads():
        return
    confirm = typer.confirm if sys.stdin.isatty() else None
    if not agree_to_spend(recipe, overrides or [], command=command, confirm=confirm):
        say("no request was sent")
        raise typer.Exit(1)


def say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(
        text, style="bold red", markup=False, highlight=False, soft_wrap=True
    )
