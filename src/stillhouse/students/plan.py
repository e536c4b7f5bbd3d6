"""The student's configuration before it exists: for estimates, and to refuse sizes early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.pruning import resized_config
from stillhouse.recipe.schema import PrunedStudent, RandomStudent
from stillhouse.students.build import planned_sizes, start_config
from stillhouse.students.random import overridden_config


def planned_config(section: PrunedStudent | RandomStudent, teacher_config: Any, base: Path) -> Any:
    """A configuration of the student's size. Which layers a pruned one keeps is not known yet,
    nor how many tokens `vocabulary: data` means: all are counted.

    Raises RecipeError where the sizes are not possible.
    """
    if isinstance(section, RandomStudent):
        return overridden_config(start_config(section, teacher_config, base), section.overrides)
    after = planned_sizes(section, teacher_config)
    return resized_config(teacher_config, after, rotated=section.hidden_method == "rotation")
