"""Checks the packages, keys, and disk space that a recipe's options need."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from stillhouse.data.windows import WINDOW_BYTES
from stillhouse.errors import DataError, EndpointError
from stillhouse.evaluation.lm_eval import require_tasks
from stillhouse.finding import Finding, finding_of
from stillhouse.generation.vllm_engine import lacks
from stillhouse.language_model.data_stage import expected_tokens
from stillhouse.language_model.job import Job, full_job
from stillhouse.language_model.run_models import RunModels, row_bytes
from stillhouse.language_model.signals_stage import records_signals
from stillhouse.number_format import size
from stillhouse.pipeline.engine import has_finished, run_folder
from stillhouse.planning.model_size import config_size
from stillhouse.signals.signals_config import SignalsRecipe
from stillhouse.teachers.api_keys import api_key


def require_options(job: Job) -> Iterator[Finding]:
    """Check trackers, lm-eval's tasks, and the key or the vLLM installation that signals need.
    Raises StillhouseError."""
    recipe = job.recipe
    here = get_available_reporting_integrations() if recipe.train.report_to else []
    for name in recipe.train.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            text = f"{name} is not a tracker that transformers supports"
            fix = f"set train.report_to to one or more of: {known}"
            yield Finding("error", "extras", text, fix)
        elif name not in here:
            yield Finding("error", "extras", f"{name} is not installed", f"pip install {name}")
    if recipe.evaluate.lm_eval is not None:
        if importlib.util.find_spec("lm_eval") is None:
            fix = "pip install 'stillhouse[eval]', or remove evaluate.lm_eval"
            yield Finding("error", "extras", "lm_eval is not installed", fix)
        else:
            require_tasks(recipe.evaluate.lm_eval.located(job.base))
    if recipe.signals is not None and not has_finished(recipe, "signals"):
        yield from _require_scorer(recipe.signals, job.base)


def _require_scorer(section: SignalsRecipe, base: Path) -> Iterator[Finding]:
    """Report a missing API key for a server, or what vLLM lacks on this machine."""
    server = section.server
    if server is not None:
        try:
            api_key(server.key_env, where=server.base_url, setting="signals.server.key_env")
        except EndpointError as error:
            yield finding_of(error)
    if section.vllm is not None:
        for level, text, fix in lacks(section.vllm, base, key="signals.vllm"):
            yield Finding(level, "vLLM", text, fix)


def require_disk(job: Job, students: Sequence[RunModels]) -> Iterator[Finding]:
    """Compare the disk space that a run needs with the free space in its folder.

    students: those still to train, in order. Each checkpoint contains weights and two moments in
    float32 and is deleted after training; each student is kept before and after training and in
    its exports. In addition, there are the token windows and a signal store.
    """
    job = full_job(job)
    recipe = job.recipe
    if not students:
        return
    need = kept = 0.0
    for models in students:
        size_of = config_size(models.student).parameters
        kept += size_of * (4 + 4 + 4 * len(models.recipe.export.formats))
        need = max(need, kept + size_of * 12 * (models.recipe.train.keep_checkpoints + 1))
    parts = ["checkpoints", "models"]
    tokens = 0
    with suppress(DataError):  # text that the run synthesizes does not exist yet
        tokens = expected_tokens(recipe.data, job.base) or 0
    if not has_finished(recipe, "data"):
        need += tokens * WINDOW_BYTES
        parts.append("windows")
    if records_signals(job) and not has_finished(recipe, "signals"):
        need += tokens * row_bytes(job)
        parts.append("signals")
    root = run_folder(recipe).root.absolute()
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    names = " and ".join([", ".join(parts[:-1]), parts[-1]])
    text = f"about {size(need)} of {names} at the peak; {size(free)} are free"
    if need > free:
        fix = (
            "free some space, lower train.keep_checkpoints, or use a different disk: "
            "--set folder=PATH"
        )
        yield Finding("error", "disk", f"{text} in {root}", fix)
    else:
        yield Finding("estimate", "disk", text)
