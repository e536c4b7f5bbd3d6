"""Checks whether there is enough calibration text for a refit."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.finding import Finding
from stillhouse.language_model.run_models import RunModels
from stillhouse.pruning.sizes import sizes_of
from stillhouse.students.student_config import PrunedStudent

ROWS_PER_NEURON = 4
"""Minimum calibration tokens per remaining neuron of a layer. A refit solves for as many unknowns
per output as there are neurons; with one or two tokens per neuron, it fits noise and is worse than
no refit (docs/experiments.md#choices-inside-the-refit)."""


def check_calibration(models: RunModels, tokens: int) -> Iterator[Finding]:
    """Warn if the FFN is refit on too few tokens. tokens: the number of training tokens."""
    section = models.recipe.student
    if not isinstance(section, PrunedStudent) or not section.refit:
        return
    kept, all_of_them = (sizes_of(config).ffn_size for config in (models.student, models.start))
    read, needed = min(section.calibration_tokens, tokens), ROWS_PER_NEURON * kept
    if kept == all_of_them or read >= needed:
        return
    text = (
        f"{read:,} calibration tokens are too few to refit {kept:,} neurons in each layer: the "
        "refit may be worse than no refit"
    )
    fix = f"raise student.calibration_tokens to at least {needed:,}"
    if tokens < needed:
        fix = f"train on at least {needed:,} tokens of text"
    fix += ", or set student.refit: false"
    yield Finding("warning", "calibration", text, fix)
