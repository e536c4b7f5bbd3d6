"""The model card: where a student comes from, what it kept, what it must not be used for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillhouse.evaluate import Evaluation, perplexity_retention
from stillhouse.evaluate.table import ROLE_NAMES
from stillhouse.export.gate import ReplayResult
from stillhouse.runfolder import sha, write_atomically

CARD = "README.md"

RESTRICTIONS = {
    r"llama2|llama3$": "Meta's license forbids using the model or its answers to improve any large "
    "language model that is not made of Llama itself.",
    r"llama": "Meta's license wants a student's name to begin with “Llama”, and “Built with Llama” "
    "to be shown where it is used.",
    r"gemma": "Google's terms count a student as a model derivative: their use restrictions must "
    "be passed on with it.",
    r"cc-by-nc": "the teacher's license allows no commercial use, nor of what is derived from it.",
    r"other": "the teacher has a license of its own: read whether it allows distillation.",
}
"""Licenses, as the Hub names them, that restrict what distillation makes: the first match."""

UNKNOWN = "unknown"


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. recipe: resolved YAML. hashes: of what the run started from, by name."""

    name: str
    teacher: str
    license: str
    data: str
    recipe: str
    hashes: dict[str, str]
    evaluation: Evaluation
    notes: list[str] = field(default_factory=list)


def teacher_license(stated: str | None, teacher: Path) -> str:
    """The license that the recipe states, else the one in the model's own card, else `unknown`."""
    if stated:
        return stated
    card = teacher / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    if head is None:
        return UNKNOWN
    try:
        found = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return UNKNOWN
    license_ = found.get("license") if isinstance(found, dict) else None
    return str(license_) if license_ else UNKNOWN


def license_warning(license_: str) -> str | None:
    """What the teacher's license says about students; None where it allows them freely."""
    if license_ == UNKNOWN:
        return (
            "the teacher's license is not known: look it up before you publish a student of it, "
            "and state it in the recipe (teacher.license)"
        )
    for pattern, warning in RESTRICTIONS.items():
        if re.match(pattern, license_.lower()):
            return warning
    return None


def write_card(folder: Path, facts: CardFacts, replay: ReplayResult) -> None:
    """Writes the card as README.md beside the exported files, which it names with their SHA-256."""
    weights = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.gguf"))]
    files = {file.name: sha(file) for file in weights}
    write_atomically(folder / CARD, model_card(facts, replay, files))


def model_card(facts: CardFacts, replay: ReplayResult, files: dict[str, str]) -> str:
    """The card's text: YAML for the Hub, then Markdown for people."""
    parts = [
        f"---\n{yaml.safe_dump(_head(facts, replay), sort_keys=False)}---",
        f"# {facts.name}",
        f"A student distilled from {facts.teacher} with Stillhouse; this folder: {replay.format}, "
        f"{replay.dtype}, {replay.bytes / 1e6:,.1f} MB.",
        "## What it kept",
        _retention(facts.evaluation),
        f"Measured on {facts.evaluation.models[0].fidelity.tokens:,} tokens of held-out text. KL "
        "is KL(teacher ‖ model) in nats a token.",
        f"This export differs from the checkpoint that was measured by {replay.kl:.2g} nats a "
        f"token and has {replay.top1_agreement:.1%} of its likeliest tokens, on "
        f"{replay.tokens:,} tokens.",
        "## License",
        _license(facts.license),
        "## Limits",
        "It inherits the teacher's faults and adds its own where it is further from it than the "
        "table says, which is everywhere but on text like that it was distilled on. Nothing else "
        "was measured: no safety, no other language, no longer context.",
        *(f"- {text}" for text in [*facts.notes, *replay.notes]),
        "## Where it comes from",
        f"Data: {facts.data}.",
        _table(("what", "SHA-256 or key"), [*facts.hashes.items(), *files.items()]),
        f"```yaml\n{facts.recipe}```",
    ]
    return "\n\n".join(parts) + "\n"


def _head(facts: CardFacts, replay: ReplayResult) -> dict[str, Any]:
    head: dict[str, Any] = {}
    if facts.license != UNKNOWN:
        head["license"] = facts.license
    head |= {
        "pipeline_tag": "text-generation",
        "library_name": "gguf" if replay.format.startswith("gguf") else "transformers",
        "tags": ["distillation", "stillhouse"],
    }
    base = facts.teacher.split(" ")[0]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and "commit" in facts.teacher:
        head["base_model"] = base
    return head


def _license(license_: str) -> str:
    text = f"The teacher's: **{license_}**."
    warning = license_warning(license_)
    return text if warning is None else f"{text} Warning: {warning}"


def _retention(evaluation: Evaluation) -> str:
    teacher = evaluation.result("teacher")
    rows = []
    for model in evaluation.models:
        kept = f"{perplexity_retention(model, teacher):.0%}" if teacher else ""
        rows.append(
            (
                ROLE_NAMES.get(model.role, model.role),
                f"{model.fidelity.kl:.3f}",
                f"{model.fidelity.top1_agreement:.1%}",
                f"{model.fidelity.perplexity:.2f} ({kept})",
                f"{model.parameters / 1e6:,.1f} M",
                f"{model.bytes_on_disk / 1e6:,.1f} MB",
            )
        )
    heads = ("model", "KL", "top-1", "perplexity (of teacher)", "parameters", "size")
    return _table(heads, rows)


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
