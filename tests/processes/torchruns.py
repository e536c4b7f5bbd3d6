"""Real torchruns on this machine, which stand in for several nodes."""

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
    """Start a torchrun in each folder, as the nodes of one run of the recipe.

    each: the number of processes of each torchrun; by default one.
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
    """Run `torchrun -m stillhouse ...` in a folder until it ends."""
    launch = ["--standalone", "--nproc-per-node", str(processes), "-m", "stillhouse"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=ENDED_SECONDS,
    )


def stderr_of(agent: subprocess.Popen[str]) -> str:
    """The standard error of a torchrun and its processes, once they have ended."""
    return agent.communicate(timeout=ENDED_SECONDS)[1]
