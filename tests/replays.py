"""Replays of exports in the process that exports: a fresh one takes seconds to import transformers.

`pytest.mark.fresh_process` is for tests whose promise is the fresh process itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stillhouse.export import replay, replay_classifier, replay_onnx

SCRIPTS = {
    "replay.py": replay.main,
    "replay_onnx.py": replay_onnx.main,
    "replay_classifier.py": replay_classifier.main,
}


def _run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    main = SCRIPTS.get(Path(command[-2]).name)
    if main is None:
        return subprocess.run(command, **options)
    main(Path(command[-1]))
    return subprocess.CompletedProcess(command, 0, "", "")


IN_THIS_PROCESS = SimpleNamespace(run=_run)
"""In the place of the module `subprocess` in stillhouse.export.fresh_process."""
