"""Arguments, prompts, and messages that several commands share."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def output_file(path: Path | None) -> Path | None:
    """Validate an option's output file, before any work. Return the path; for a link to a file,
    the path of that file.

    Raises BadParameter if the path is a folder, or if its parent does not exist or is not writable.
    """
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file in it")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist: create it first")
    if path.is_symlink() and path.is_file():
        path = path.resolve()
    # A file is replaced, which takes permission for its folder; a device or a pipe is written.
    written = path if path.exists() and not path.is_file() else path.absolute().parent
    if not os.access(written, os.W_OK):
        kind = "" if written == path else "the folder "
        raise typer.BadParameter(f"{kind}{written} is not writable: check its permissions")
    return path


RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any recipe key; repeatable."),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the figures to this file.", callback=output_file),
]
YesOption = Annotated[
    bool,
    typer.Option("--yes", help="Skip the confirmation before paying for an API without a budget."),
]


def agree(
    recipe: Path, overrides: list[str] | None, yes: bool, *, synthesize: bool = False
) -> None:
    """Ask before spending money without a budget. Raises RecipeError if there is no terminal."""
    from stillhouse.commands import agree_to_spend
    from stillhouse.launch import leads

    if yes or not leads():
        return
    confirm = typer.confirm if sys.stdin.isatty() else None
    if not agree_to_spend(recipe, overrides or [], synthesize=synthesize, confirm=confirm):
        say("no request was sent")
        raise typer.Exit(1)


def keep_imports() -> None:
    """Exempt imported modules from garbage collection. A run collects garbage at each stage, and
    scanning the objects of torch and transformers would take 0.3 s each time."""
    gc.freeze()


def answered(question: str, default: str) -> str:
    """Ask for a line of text. Raises RecipeError if standard input ends before a line arrives."""
    from stillhouse.errors import RecipeError

    try:
        return str(typer.prompt(question, default=default))
    except typer.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        raise RecipeError(
            f"no answer to the question: {question}",
            where="stillhouse init",
            fix="pass the answers as flags: --job, --teacher, --data, --size, --out "
            "(stillhouse init --help)",
        ) from None


def say(text: str) -> None:
    from stillhouse.terminal import Terminal

    Terminal(stderr=True).write_line(text, style="bold red")


def quoted(path: str | Path) -> str:
    """Quote a path as a shell argument on one line."""
    from stillhouse.errors import in_one_line

    return in_one_line(shlex.quote(str(path)))
