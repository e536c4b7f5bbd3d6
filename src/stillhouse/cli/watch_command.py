"""The `watch` command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.stop_signals import Stopped


class Device(StrEnum):
    """Where the chat's models run."""

    cpu = "cpu"
    cuda = "cuda"


def watch(
    folder: Annotated[Path, typer.Argument(help="A folder of runs; it may not exist yet.")] = Path(
        "runs"
    ),
    port: Annotated[
        int, typer.Option(help="Port on localhost; 0 lets the system choose.", min=0, max=65535)
    ] = 8000,
    device: Annotated[
        Device, typer.Option(help="Device for the chat's models; cpu leaves the GPU to training.")
    ] = Device.cpu,
) -> None:
    """Serve a live page of runs on localhost: steps, curves, metrics, and a chat with the models.

    Only reads run folders. Press Ctrl-C to stop.

    Example: `stillhouse watch runs`
    """
    from stillhouse.terminal import Terminal
    from stillhouse.watch.watch_server import serve

    def announce(address: str) -> None:
        Terminal().write_line(f"watch   {address}")

    try:
        serve(folder, port, device.value, announce)
    except Stopped as stopped:  # there is nothing to resume
        raise typer.Exit(128 + stopped.number) from None
