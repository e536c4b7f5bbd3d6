"""The result of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.pipeline.kind import RunResult
from stillhouse.runfolder import Cost, Stage


def test_a_stage_is_found_by_its_name() -> None:
    train = Stage("train", Path("stages/train-1"), "1", Cost(), {}, False)
    result = RunResult("language model", Path(), Path(), Path(), None, [train])
    assert result.stage("train") is train
    with pytest.raises(KeyError, match="qat"):
        result.stage("qat")
