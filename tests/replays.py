"""Replays exports in the exporting process: a fresh one takes seconds to import transformers.

`pytest.mark.fresh_process` marks tests of the fresh process itself.
"""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SCRIPTS = ("replay.py", "replay_onnx.py", "replay_classifier.py")


def _run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    script = Path(command[-2])
    if script.name not in SCRIPTS:
        return subprocess.run(command, **options)
    # Imported late: onnxruntime starts threads, and a process that forks others must not have any.
    import_module(f"stillhouse.export.{script.stem}").main(Path(command[-1]))
    return subprocess.CompletedProcess(command, 0, "", "")


IN_THIS_PROCESS = SimpleNamespace(run=_run)
"""Replaces the module `subprocess` in stillhouse.export.fresh_process."""
