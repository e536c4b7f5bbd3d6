"""The commands of `stillhouse signals`: record, verify, info, export, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stillhouse.cli.options import (
    RecipeArgument,
    SetOption,
    YesOption,
    agree,
    keep_imports,
    output_file,
    say,
)
from stillhouse.launch import leads


class _RecipeOrVerb(TyperGroup):
    """`signals RECIPE` is `signals record RECIPE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            args = ["record", *args]
        return super().resolve_command(ctx, args)


signals = typer.Typer(cls=_RecipeOrVerb, no_args_is_help=True, rich_markup_mode="markdown")
StoreArgument = Annotated[Path, typer.Argument(help="A signal store, e.g. runs/NAME/signals.")]


@signals.callback()
def signals_group() -> None:
    """Cache teacher outputs in a store, and manage stores.

    Example: `stillhouse signals recipes/stored.yaml`, then
    `stillhouse signals info runs/stored/signals`
    """


@signals.command()
def record(recipe: RecipeArgument, set_: SetOption = None, yes: YesOption = False) -> None:
    """Score every training window with the teacher once; training then reads the store.

    Example: `stillhouse signals recipes/stored.yaml --set signals.encoding.bytes=50`
    """
    from stillhouse.commands import record_signals
    from stillhouse.terminal import Terminal

    keep_imports()
    agree(recipe, set_, yes)
    folder = record_signals(recipe, set_ or [])
    if leads():
        Terminal().write_line(f"signals {folder}")


@signals.command()
def verify(store: StoreArgument) -> None:
    """Read an entire store and report damage. Exits with status 1 if there is any.

    Example: `stillhouse signals verify runs/stored/signals`
    """
    from stillhouse.signals.verify import verify as wrong_in
    from stillhouse.terminal import Terminal

    wrong = wrong_in(store)
    for error in wrong:
        say(f"error: {error}")
    if wrong:
        raise typer.Exit(1)
    Terminal().write_line(f"{store} is sound")


@signals.command()
def info(store: StoreArgument) -> None:
    """Show what a store contains, what it left out, and which divergences it supports.

    Example: `stillhouse signals info runs/stored/signals`
    """
    from rich.table import Table

    from stillhouse.signals.verify import info as about
    from stillhouse.terminal import Terminal

    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, value in about(store).lines():
        table.add_row(name, value)
    Terminal().print(table)


@signals.command()
def export(
    store: StoreArgument,
    parquet: Annotated[Path, typer.Option(help="The Parquet file to write.", callback=output_file)],
) -> None:
    """Write a store as Parquet, one row per token, for other tools.

    Example: `stillhouse signals export runs/stored/signals --parquet signals.parquet`
    """
    from stillhouse.signals.parquet_export import export_parquet
    from stillhouse.terminal import Terminal

    Terminal().write_line(f"{export_parquet(store, parquet):,} rows  {parquet}")


@signals.command()
def push(
    store: StoreArgument,
    repository: Annotated[str, typer.Argument(help="A dataset on the Hub: org/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make the dataset public.")] = False,
) -> None:
    """Upload a finished store to the Hugging Face Hub, private by default.

    Example: `stillhouse signals push runs/stored/signals my-name/my-signals`
    """
    from stillhouse.signals.store_hub import upload_store
    from stillhouse.terminal import Terminal

    Terminal().write_line(upload_store(store, repository, private=not public))


@signals.command()
def pull(
    repository: Annotated[str, typer.Argument(help="A dataset on the Hub: org/name.")],
    store: Annotated[Path, typer.Argument(help="The folder to write.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag, or commit.")] = None,
) -> None:
    """Download a store from the Hugging Face Hub and verify it.

    Example: `stillhouse signals pull my-name/my-signals signals`
    """
    from stillhouse.signals.store_hub import download_store
    from stillhouse.terminal import Terminal

    path = download_store(repository, store, revision=revision)
    Terminal().write_line(f"{path} is sound")
