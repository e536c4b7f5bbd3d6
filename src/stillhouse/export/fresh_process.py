"""Runs a script in this folder by its path, in a process that imports nothing from Stillhouse."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.disk_errors import full_disk
from stillhouse.errors import ModelError


def run_script(
    script: str,
    folder: Path,
    request: Mapping[str, Any],
    *,
    what: str,
    where: Path,
    fix: str,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> None:
    """Write the request to `folder`, the script's argument, and wait for the script to finish.

    env: None is this process's environment. Raises ModelError with `what` and the script's last
    line of output, and OSError if a disk is full.
    """
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # -P: the script's folder must not be searched for modules.
    done = subprocess.run(
        [python, "-P", str(Path(__file__).with_name(script)), str(folder)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        if full_disk(Exception(last[0])):
            raise OSError(errno.ENOSPC, last[0])
        raise ModelError(f"{what} ({last[0]})", where=where, fix=fix)


def offline() -> dict[str, str]:
    """This process's environment, in which transformers does not contact the Hub and shows errors
    only."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
