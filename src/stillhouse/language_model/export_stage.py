"""The last stages of a run: the exports, their upload, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stillhouse.data.draw_windows import draw_windows
from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.results import EVALUATION, Evaluation
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.compressed import export_compressed
from stillhouse.export.gate import Gate, ReplayResult, against_teacher
from stillhouse.export.gguf_export import WEIGHTED, export_gguf
from stillhouse.export.licenses import Origin, distinct
from stillhouse.export.llama_quantizer import has_llama_cpp
from stillhouse.export.model_card import ModelCard, write_language_model_card
from stillhouse.export.push import push
from stillhouse.export.torchao import export_torchao
from stillhouse.hardware import (
    default_device,
    free_memory_bytes,
    peak_memory_bytes,
)
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job
from stillhouse.language_model.model_origins import origins_of
from stillhouse.language_model.recipe import Recipe
from stillhouse.pipeline.kind import Step
from stillhouse.pipeline.report_stage import plan_report
from stillhouse.planning.model_size import config_size
from stillhouse.progress import note
from stillhouse.quantize.moments import Moments, input_moments
from stillhouse.quantize.quantization import FILE, Quantization
from stillhouse.report.language_model_report import language_model_report
from stillhouse.report.page import Report
from stillhouse.report.sections import RunFacts
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.section import recipe_yaml
from stillhouse.teachers.load_model import load_config, load_model
from stillhouse.training.checkpoints import METRICS, read_metrics
from stillhouse.training.train import MODEL


def plan_export(
    job: Job, data: Stage, evaluated: Stage, trained: Stage, *quantized: Stage | None
) -> StagePlan:
    """Plan exporting the run's last model, trained or quantized."""
    shipped = [stage for stage in (trained, *quantized) if stage is not None][-1]
    recipe, section = job.recipe.with_programs(job.base), job.recipe.export
    origins = distinct([*origins_of(job), *job.ancestors])
    grid_file = shipped.path / FILE

    def work(out: Path) -> Outcome:
        _, heldout = open_data(data)
        prompts, seed = job.recipe.evaluate.prompts, job.recipe.seed
        gate = Gate(job.model(shipped), heldout, prompts, seed, section.kl_limit)
        grid = Quantization.load(grid_file) if grid_file.is_file() else None
        card = _card(job, data, shipped, Evaluation.load(evaluated.path / EVALUATION), origins)
        replays: list[ReplayResult] = []
        calibration = _calibration(job, data)
        moments = _moments(job, shipped, calibration)
        with _with_teacher(job, gate) as checks:
            for form in section.formats:
                folder = out / shipped_folder(form)
                replay = _export(checks, folder, form, recipe, grid, moments, calibration)
                write_language_model_card(folder, card, replay)
                replays.append(replay)
        return Outcome(
            summary={"replays": [asdict(replay) for replay in replays]},
            peak_memory_bytes=peak_memory_bytes(),
        )

    inputs = {
        "recipe": section.model_dump(mode="json", exclude={"push_to_hub"}),
        "name": job.recipe.name,
        "prompts": job.recipe.evaluate.prompts,
        "data": data.digest,
        "shipped": shipped.digest,
        "evaluated": evaluated.digest,
        "origins": [asdict(one) for one in origins],
        "llama_cpp": has_llama_cpp(),
    }
    return StagePlan("export", inputs, work, version=7)


def _with_teacher(job: Job, gate: Gate) -> AbstractContextManager[Gate]:
    """Make the gate also compare exports with the teacher, if the teacher has the same tokens and
    fits on the device by itself."""
    if job.folded:
        return nullcontext(gate)
    device, dtype = default_device(), job.precision.dtype
    needed = config_size(load_config(job.teacher)).parameters * dtype.itemsize
    if needed > free_memory_bytes(device):
        note(f"the teacher does not fit on {device}: comparing exports with the student only")
        return nullcontext(gate)
    return against_teacher(gate, job.teacher, vocabulary=job.vocabulary, dtype=dtype)


def _export(
    gate: Gate,
    folder: Path,
    form: str,
    recipe: Recipe,
    grid: Quantization | None,
    moments: Moments | None,
    calibration: list[Any],
) -> ReplayResult:
    if form.startswith("compressed-"):
        return export_compressed(
            gate,
            folder,
            method=form.removeprefix("compressed-"),
            python=recipe.export.llm_compressor,
            windows=calibration,
        )
    if form != "safetensors":
        return export_gguf(
            gate,
            folder,
            kind=form.removeprefix("gguf-"),
            name=recipe.name,
            quantization=grid,
            moments=moments,
        )
    dtype = recipe.export.dtype
    if grid is None:
        return export_checkpoint(gate, folder, dtype=dtype)
    return export_torchao(gate, folder, quantization=grid, dtype=dtype)


def _calibration(job: Job, data: Stage) -> list[Any]:
    section = job.recipe.export
    if section.importance_tokens is None:
        return []
    windows, _ = open_data(data)
    chosen, _ = draw_windows(windows, section.importance_tokens, job.recipe.seed)
    return chosen


def _moments(job: Job, shipped: Stage, calibration: list[Any]) -> Moments | None:
    forms = job.recipe.export.formats
    if not calibration or not any(form.removeprefix("gguf-") in WEIGHTED for form in forms):
        return None
    loaded = load_model(job.model(shipped), dtype=torch.float32)
    return input_moments(loaded.to(default_device()), calibration)


def plan_push(job: Any, exported: Stage) -> StagePlan:
    """Plan uploading the exports. All of them passed their replay, because a failed export ends the
    run before this stage.

    job: the job of any kind of run with an `export` section.
    """
    section, forms, name = job.recipe.export.push_to_hub, job.recipe.export.formats, job.recipe.name

    def work(_out: Path) -> Outcome:
        folders = {form: exported.path / shipped_folder(form) for form in forms}
        commits = push(section, folders, name)
        return Outcome(summary={"repo": section.repo, "commits": commits})

    inputs = {"recipe": section.model_dump(mode="json"), "exported": exported.digest, "name": name}
    return StagePlan("push", inputs, work)


EXPORT_PURPOSE = "write the files, then load and compare each in a fresh process"
"""The purpose of the export step in every kind of run."""
PUSH = Step(
    "push",
    plan_push,
    ("export",),
    applies=lambda job: job.recipe.export.push_to_hub is not None,
    main_process=True,
    purpose="upload the exports",
)


def shipped_folder(form: str) -> str:
    """The name of a format's folder in the stage, and of the link to it in the run folder."""
    return MODEL if form == "safetensors" else form


def _card(
    job: Job, data: Stage, shipped: Stage, evaluation: Evaluation, origins: Sequence[Origin]
) -> ModelCard:
    sources = [source.model_dump(exclude_none=True) for source in job.recipe.data.sources]
    windows, _ = open_data(data)
    return ModelCard(
        name=job.recipe.name,
        pipeline="text-generation",
        origins=origins,
        about=[f"A student distilled from {origins[0].model} with Stillhouse."],
        metrics=metrics_of(evaluation),
        data=f"{windows.supervised_tokens:,} training tokens from "
        + "; ".join(" ".join(str(value) for value in source.values()) for source in sources),
        recipe=recipe_yaml(job.recipe),
        hashes={
            "teacher": job.teacher.fingerprint,
            "data": data.digest,
            "checkpoint": shipped.digest,
        },
    )


def plan_language_model_report(job: Job, stages: dict[str, Stage]) -> StagePlan:
    def collect() -> Report:
        rounded = stages.get("quantize")
        return language_model_report(
            RunFacts.gather(job.recipe, job.teacher.described, stages.values()),
            evaluation=Evaluation.load(stages["evaluate"].path / EVALUATION),
            history=read_metrics(stages["train"].path / METRICS),
            student=stages["student"].summary,
            replays=stages["export"].summary["replays"],
            notes=[] if rounded is None else rounded.summary.get("notes", []),
        )

    return plan_report(job.recipe, stages, collect, version=5)
