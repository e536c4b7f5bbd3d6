"""The stages of a run: what each depends on, and the work that fills its folder.

A function named plan_… takes the job and the finished stages that it reads, and returns a
`StagePlan`; it does nothing yet. `stillhouse.runner` has their order.
"""

from stillhouse.stages.data import plan_data
from stillhouse.stages.evaluate import EVALUATION, plan_evaluation
from stillhouse.stages.plan import (
    Do,
    StagePlan,
    doing,
    open_data,
    redone,
    telling,
    unanswered,
)
from stillhouse.stages.quantize import plan_quantization, plan_quantized_training
from stillhouse.stages.signals import (
    STORE,
    StoredSignals,
    for_one_head,
    plan_signals,
    signal_identity,
    stored_signals,
)
from stillhouse.stages.train import plan_baseline, plan_student, plan_training

__all__ = [
    "EVALUATION",
    "STORE",
    "Do",
    "StagePlan",
    "StoredSignals",
    "doing",
    "for_one_head",
    "open_data",
    "plan_baseline",
    "plan_data",
    "plan_evaluation",
    "plan_quantization",
    "plan_quantized_training",
    "plan_signals",
    "plan_student",
    "plan_training",
    "redone",
    "signal_identity",
    "stored_signals",
    "telling",
    "unanswered",
]
