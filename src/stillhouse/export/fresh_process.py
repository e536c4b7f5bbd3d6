"""Run a script in this folder by its path, in a process that imports nothing from Stillhouse."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.disk_errors import full_disk
from stillhouse.errors import ModelError, process_failure
from stillhouse.scratch import temporary_folder


def run_script(
    script: str,
    request: Mapping[str, Any],
    *,
    windows: Mapping[str, Tensor] | None = None,
    what: str,
    where: Path,
    fix: str,
    python: str = sys.executable,
    offline: bool = False,
) -> dict[str, Any]:
    """Run a script, and return its answer: answer.json, and the tensors of logits.safetensors.

    The script's argument is a temporary folder with request.json and, if there are windows,
    windows.safetensors.

    what, where, fix: of the error if the script fails.
    offline: keep transformers from contacting the Hub and from logging anything but errors.

    Raises ModelError if the script fails, and RunError if a disk is full.
    """
    settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} if offline else {}
    with temporary_folder(f"stillhouse-{Path(script).stem}-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        if windows is not None:
            save_file(dict(windows), folder / "windows.safetensors")
        # -P: do not search the script's folder for modules.
        done = subprocess.run(
            [python, "-P", str(Path(__file__).with_name(script)), name],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            why = process_failure(done.returncode, done.stderr)
            if full_disk(Exception(why)):
                raise OSError(errno.ENOSPC, why)
            raise ModelError(f"{what} ({why})", where=where, fix=fix)
        answer, tensors = folder / "answer.json", folder / "logits.safetensors"
        found = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
        return found | (load_file(tensors) if tensors.is_file() else {})
