"""Students as they start: pretrained, random, or pruned from the teacher."""

from stillhouse.students.build import build_student, config_sha256
from stillhouse.students.plan import planned_config
from stillhouse.students.random import overridden_config, random_model

__all__ = [
    "build_student",
    "config_sha256",
    "overridden_config",
    "planned_config",
    "random_model",
]
