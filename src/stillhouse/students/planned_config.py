"""The planned student's configuration, for estimates and to reject impossible sizes early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stillhouse.pruning.prune import check_importance
from stillhouse.pruning.shapes import planned_shape
from stillhouse.pruning.sizes import Sizes, check_sizes, resized_config, sizes_of
from stillhouse.students.build_student import start_config
from stillhouse.students.pruned_student import explicit_sizes
from stillhouse.students.random_student import for_tokenizer, overridden_config
from stillhouse.students.student_config import PrunedStudent, RandomStudent
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.model_source import ModelSource


def planned_config(
    section: PrunedStudent | RandomStudent,
    teacher_config: Any,
    base: Path,
    *,
    served: torch.dtype = torch.bfloat16,
    owner: str | None = None,
    tokenizer: ModelSource | None = None,
) -> Any:
    """A configuration with the student's sizes.

    It is not known yet which layers a pruned student keeps, nor how many tokens `vocabulary: data`
    keeps; all tokens are counted.
    served: the dtype of the exported weights, for a target in bytes. owner: the pruned model's name
    in error messages; None: as in the section. tokenizer: a random student's, if it is not the
    teacher's.
    Raises RecipeError if the sizes are impossible; for a target, only if that is certain.
    """
    if isinstance(section, RandomStudent):
        config = start_config(section, teacher_config, base)
        if tokenizer is not None:
            config = for_tokenizer(config, load_tokenizer(tokenizer))
        return overridden_config(config, section.overrides)
    if section.target is None:
        after = explicit_sizes(section, teacher_config, owner=owner)
        check_importance(section, sizes_of(teacher_config), after)
    else:
        after = _searched_sizes(section, teacher_config, served)
    return resized_config(teacher_config, after, rotated=section.hidden_method == "rotation")


def _searched_sizes(section: PrunedStudent, config: Any, served: torch.dtype) -> Sizes:
    """Sizes of the shape that meets the target with the fewest cuts. The search finds the best
    shape."""
    assert section.target is not None
    before, axes = sizes_of(config), section.search.axes
    # Everything that the search can cut must be ranked, whichever shape it will choose.
    cut = {key: 0 for key in ("ffn_size", "experts") if key in axes}
    check_importance(section, before, replace(before, **cut))
    vocabulary = section.vocabulary
    if isinstance(vocabulary, int):
        # The search prunes the model without the removed tokens.
        config = resized_config(config, check_sizes(config, {"vocabulary": vocabulary}))
    return planned_shape(
        config,
        section.search,
        section.target,
        width=served.itemsize,
        certain=vocabulary is None or isinstance(vocabulary, int),
    )
