"""Checks the exports before anything is spent: whether the formats support the models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from stillhouse.export.compressed import announce_compressed, require_llm_compressor
from stillhouse.export.gguf_export import announce_gguf
from stillhouse.export.licenses import find_license, license_warning
from stillhouse.export.push import require_token
from stillhouse.export.torchao import require_torchao
from stillhouse.finding import Finding
from stillhouse.language_model.job import Job, configs, full_job
from stillhouse.language_model.recipe import Recipe
from stillhouse.pipeline.engine import has_finished
from stillhouse.quantize.quantize import grid_of, planned_bytes
from stillhouse.quantize.units import left_over_text
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.planned_model import planned_model


def require_exports(job: Job) -> Iterator[Finding]:
    """Check that the student can be exported. Raises StillhouseError if it cannot."""
    job = full_job(job)
    yield from export_findings(job.recipe, job, [("", configs(job)[0])])


def export_findings(
    recipe: Recipe, job: Job, students: Sequence[tuple[str, Any]]
) -> Iterator[Finding]:
    """Check the exports of students. students: the name (empty for a single student) and the
    configuration of each exported student."""
    recipe = recipe.with_programs(job.base)
    tokenizer = load_tokenizer(job.tokenizer)
    section = recipe.export
    layers_before = None
    if isinstance(recipe.student, PrunedStudent):
        layers_before = int(load_config(job.start).get_text_config().num_hidden_layers)
    for name, student in students:
        of = f"{name}: " if name else ""
        if recipe.quantize is not None:
            plain, rounded = planned_bytes(planned_model(student), recipe.quantize)
            text = f"{rounded / 1e6:,.1f} MB quantized, {plain / 1e6:,.1f} MB without quantization"
            yield Finding("estimate", "quantize", of + text)
            if left := left_over_text(planned_model(student)):
                yield Finding("warning", "quantize", of + left)
        for form in section.formats:
            yield from (
                Finding(level, "export", of + text, fix)
                for level, text, fix in _format(form, recipe, student, tokenizer, layers_before)
            )
    if recipe.quantize is not None and "safetensors" in section.formats:
        require_torchao(grid_of(recipe.quantize), recipe.quantize.dynamic, section.dtype)
    if section.push_to_hub is not None and not has_finished(recipe, "push"):
        require_token(section.push_to_hub)
    yield Finding("ok", "export", ", ".join(section.formats))
    warning = license_warning(find_license(recipe.teacher.license, job.teacher.path).shown)
    if warning is not None:
        yield Finding("warning", "license", warning)


def _format(
    form: str, recipe: Recipe, student: Any, tokenizer: Any, layers_before: int | None
) -> Iterator[tuple[Literal["warning", "error"], str, str]]:
    kind, _, name = form.partition("-")
    if kind == "gguf":
        grid = None if recipe.quantize is None else grid_of(recipe.quantize)
        for text, fix in announce_gguf(name, student, tokenizer, grid, layers_before=layers_before):
            yield "warning", text, fix
    elif kind == "compressed":
        require_llm_compressor(recipe.export.llm_compressor)
        found = announce_compressed(name, student)
        if found is not None:
            yield "error", *found
