"""Checks of a sharded teacher before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig

from stillhouse.errors import ModelError
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.planned_model import check_planned_head
from stillhouse.teachers.sharded_teacher import load_sharded_teacher


@pytest.mark.parametrize("config", [GPT2Config(), OPTConfig()])
def test_an_architecture_without_a_sharding_plan_is_rejected(
    config: object, tmp_path: Path
) -> None:
    """transformers' plan for GPT-2 names modules that it does not have."""
    config.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    source = ModelSource(tmp_path, "teacher", "")
    with pytest.raises(ModelError, match="no plan to shard") as caught:
        load_sharded_teacher(source, dtype=torch.float32, shards=2)
    assert "signals" in str(caught.value.fix)


def test_the_head_of_a_large_model_is_checked_without_its_weights() -> None:
    model = check_planned_head(LlamaConfig(hidden_size=8192, num_attention_heads=64))
    backbone = {parameter.device.type for parameter in model.base_model.parameters()}
    assert backbone == {"meta"}
