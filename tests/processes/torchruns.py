"""Real torchruns of this machine, as on several nodes."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ENDED_SECONDS = 300


def agents(
    path: Path, folders: Sequence[Path], each: Sequence[int] = ()
) -> list[subprocess.Popen[str]]:
    """A torchrun in each of the folders, all of one run of the recipe.

    each: processes of each torchrun; by default one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launch = ["--nnodes", str(len(folders)), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *launch,
                "--nproc-per-node",
                str(processes),
                "-m",
                "stillhouse",
                "run",
                path,
            ],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder, processes in zip(folders, each or [1] * len(folders), strict=True)
    ]


def torchrun(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`torchrun -m stillhouse ...` in a folder, when it has ended."""
    launch = ["--standalone", "--nproc-per-node", str(processes), "-m", "stillhouse"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=ENDED_SECONDS,
    )


def words(agent: subprocess.Popen[str]) -> str:
    """What a torchrun and its processes have said of what went wrong."""
    return agent.communicate(timeout=ENDED_SECONDS)[1]
