"""Run TRL's GOLD and ULD losses for bench/tokenizer_contenders.py, in an environment with TRL.

Imports nothing from this project. Each input line names a file with a problem, and the file to
which the loss and gradient are written.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

DEFAULTS = {
    "uld_crossentropy_weight": 0.0,
    "uld_distillation_weight": 1.0,
    "uld_student_temperature": 1.0,
    "uld_teacher_temperature": 1.0,
    "uld_skip_student_eos": True,
    "uld_skip_teacher_eos": True,
    "use_extended_uld": True,
    "uld_token_merge_strategy": "observed",
    "uld_use_hybrid_loss": False,
    "uld_hybrid_matched_weight": None,
    "uld_hybrid_unmatched_weight": None,
    "beta": 0.5,
}
"""Defaults of GOLDConfig."""


def tokenizer(side: dict[str, Any]) -> Any:
    core = Tokenizer.from_str(side["tokenizer"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=side["eos"])


def run(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    from trl.experimental.gold.gold_trainer import ULDLoss

    student, teacher = given["student"], given["teacher"]
    config = SimpleNamespace(**{**DEFAULTS, **given["settings"]})
    loss = ULDLoss(config, tokenizer(student), tokenizer(teacher))
    logits_LV = student["logits"].clone().requires_grad_()
    labels = []
    for side in (student, teacher):
        labels_L = side["ids"].clone()
        labels_L[0] = -100
        labels.append(labels_L[None])
    value = loss(
        logits_LV[None],
        teacher["logits"][None],
        labels[0],
        labels[1],
        student["ids"][None],
        teacher["ids"][None],
        student_byte_offsets=student["offsets"][None],
        teacher_byte_offsets=teacher["offsets"][None],
    )
    value.sum().backward()
    return {"value": value.detach().sum(), "gradient": logits_LV.grad}


def main() -> None:
    for line in sys.stdin:
        given, found = line.split()
        answer: dict[str, Any]
        try:
            answer = run(torch.load(given, weights_only=True))
        except Exception as error:  # an exception of any library is a finding
            answer = {"error": f"{type(error).__name__}: {error}"}
        torch.save(answer, found)
        print(f"done {found}", flush=True)


if __name__ == "__main__":
    main()
