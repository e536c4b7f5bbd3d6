"""Distill language models: a small student learns to reproduce a large teacher's behavior.

    import stillhouse as sh
    sh.run("recipes/demo.yaml")                      # a recipe; or step by step:
    teacher = sh.Teacher.load("Qwen/Qwen3-8B")
    data = sh.Data.build("texts.jsonl", teacher.tokenizer)
    student = sh.Student.prune(teacher, data, params="60%")
    sh.distill(student, teacher, data, objective=[sh.KL()])
    print(sh.evaluate(student, teacher, data))

See docs/python.md.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from stillhouse.errors import StillhouseError

if TYPE_CHECKING:
    from stillhouse.commands import run
    from stillhouse.data.batches import collate
    from stillhouse.data.data import Data
    from stillhouse.evaluation.results import Evaluation
    from stillhouse.objectives import Term, fused_loss
    from stillhouse.pipeline.kind import RunResult
    from stillhouse.python_api import (
        JSD,
        KL,
        AttentionRelations,
        Chunks,
        CrossEntropy,
        HiddenStates,
        ReverseKL,
        Rollouts,
        distill,
        divergence,
        evaluate,
        record,
        search_sizes,
    )
    from stillhouse.signals import DenseSignal, LMHead
    from stillhouse.students.student import Student
    from stillhouse.teachers.teacher import Teacher
    from stillhouse.training.distillation import Distillation
    from stillhouse.training.train import TrainingResult
    from stillhouse.training.trainer import DistillationTrainer

# transformers imports torchao if it is installed, and torchao warns about each GPU kernel it lacks.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = [
    "JSD",
    "KL",
    "AttentionRelations",
    "Chunks",
    "CrossEntropy",
    "Data",
    "DenseSignal",
    "Distillation",
    "DistillationTrainer",
    "Evaluation",
    "HiddenStates",
    "LMHead",
    "ReverseKL",
    "Rollouts",
    "RunResult",
    "StillhouseError",
    "Student",
    "Teacher",
    "Term",
    "TrainingResult",
    "__version__",
    "collate",
    "distill",
    "divergence",
    "evaluate",
    "fused_loss",
    "record",
    "run",
    "search_sizes",
]

_OWNERS = {
    "Data": "data.data",
    "DenseSignal": "signals",
    "Distillation": "training.distillation",
    "DistillationTrainer": "training.trainer",
    "Evaluation": "evaluation.results",
    "LMHead": "signals",
    "RunResult": "pipeline.kind",
    "Student": "students.student",
    "Teacher": "teachers.teacher",
    "Term": "objectives",
    "TrainingResult": "training.train",
    "collate": "data.batches",
    "fused_loss": "objectives",
    "run": "commands",
}
"""The modules of the names that are not in `python_api`."""


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import, so submodules are imported lazily.
    if name not in __all__:
        raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
    return getattr(import_module(f"stillhouse.{_OWNERS.get(name, 'python_api')}"), name)


def __dir__() -> list[str]:
    return __all__
