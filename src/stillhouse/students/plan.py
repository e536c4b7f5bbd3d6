"""The student's configuration before it exists: for estimates, and to refuse sizes early."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from stillhouse.pruning import check_sizes
from stillhouse.pruning.sizes import keep_config_layers
from stillhouse.recipe.schema import PrunedStudent, RandomStudent
from stillhouse.students.build import start_config
from stillhouse.students.random import overridden_config


def planned_config(section: PrunedStudent | RandomStudent, teacher_config: Any, base: Path) -> Any:
    """A configuration of the student's size. Which layers a pruned one keeps is not known yet.

    Raises RecipeError where the sizes are not possible.
    """
    if isinstance(section, RandomStudent):
        return overridden_config(start_config(section, teacher_config, base), section.overrides)
    check_sizes(teacher_config, section.ffn_size, section.layers)
    config = copy.deepcopy(teacher_config)
    if section.ffn_size is not None:
        config.intermediate_size = section.ffn_size
    if section.layers is not None:
        keep_config_layers(config, range(section.layers))
    return config
