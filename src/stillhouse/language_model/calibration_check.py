"""Whether the calibration text can determine a refit."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.finding import Finding
from stillhouse.language_model.run_models import RunModels
from stillhouse.pruning.sizes import sizes_of
from stillhouse.students.student_config import PrunedStudent

ROWS_PER_NEURON = 4
"""Calibration tokens for each of a layer's remaining neurons, which a refit has as many unknowns as
for each output. With one or two, the refit fits noise, and is worse than none
(docs/experiments.md#choices-inside-the-refit)."""


def check_calibration(models: RunModels, tokens: int) -> Iterator[Finding]:
    """A warning if the FFN is refit to too few tokens. tokens: of the training text."""
    section = models.recipe.student
    if not isinstance(section, PrunedStudent) or not section.refit:
        return
    kept, all_of_them = (sizes_of(config).ffn_size for config in (models.student, models.start))
    read, needed = min(section.calibration_tokens, tokens), ROWS_PER_NEURON * kept
    if kept == all_of_them or read >= needed:
        return
    text = (
        f"{read:,} tokens of calibration are too few to refit {kept:,} neurons in each layer: the "
        "refit may be worse than none"
    )
    fix = f"raise student.calibration_tokens to at least {needed:,}"
    if tokens < needed:
        fix = f"train on at least {needed:,} tokens of text"
    fix += ", or set student.refit: false"
    yield Finding("warning", "calibration", text, fix)
