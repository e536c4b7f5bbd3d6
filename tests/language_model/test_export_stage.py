"""An export is compared with the teacher if the teacher fits in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.export.gate import Gate
from stillhouse.language_model import export_stage
from stillhouse.language_model.job import find_models
from tests import tiny
from tests.export.conftest import ToyWindows


@pytest.mark.parametrize(("free", "compared"), [(1 << 40, True), (1000, False)])
def test_a_teacher_that_does_not_fit_in_memory_is_left_out(
    free: int,
    compared: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export_stage, "free_memory_bytes", lambda device: free)
    job = find_models(tiny.parsed(tiny.recipe(tmp_path)), tmp_path)
    gate = Gate(job.teacher.path, ToyWindows(), [], seed=0)
    with export_stage._with_teacher(job, gate) as asked:
        assert (asked.teacher_logits is not None) == compared
    assert ("the teacher does not fit on cpu" in capsys.readouterr().err) != compared
