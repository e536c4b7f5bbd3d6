"""The model card: where a student comes from, what it kept, what it must not be used for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillhouse.evaluate.results import Evaluation
from stillhouse.evaluate.retention_table import ROLE_NAMES, perplexity_retention
from stillhouse.export.gate import ReplayResult
from stillhouse.export.licenses import CARD, Origin, licenses_section, origins_head
from stillhouse.runfolder import sha, write_atomically

TAGS = ["distillation", "stillhouse"]
WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data")
LIMITS = (
    "It inherits the teacher's faults and adds its own where it is further from it than the table "
    "says, which is everywhere but on text like that it was distilled on. Nothing else was "
    "measured: no safety, no other language, no longer text."
)


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. origins: the teacher, and what else took part. recipe: resolved YAML.
    hashes: of what the run started from, by name."""

    name: str
    origins: Sequence[Origin]
    data: str
    recipe: str
    hashes: dict[str, str]
    evaluation: Evaluation
    notes: list[str] = field(default_factory=list)


def write_card(folder: Path, facts: CardFacts, replay: ReplayResult) -> None:
    """Writes the card as README.md beside the exported files, which it names with their SHA-256."""
    write_atomically(folder / CARD, model_card(facts, replay, weight_hashes(folder)))


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that hold weights, by their names."""
    weights = [file for kind in WEIGHTS for file in sorted(folder.glob(kind))]
    return {file.name: sha(file) for file in weights}


def model_card(facts: CardFacts, replay: ReplayResult, files: dict[str, str]) -> str:
    """The card's text: YAML for the Hub, then Markdown for people."""
    parts = [
        f"---\n{yaml.safe_dump(_head(facts, replay), sort_keys=False)}---",
        f"# {facts.name}",
        f"A student distilled from {facts.origins[0].model} with Stillhouse; this folder: "
        f"{replay.format}, {replay.dtype}, {replay.bytes / 1e6:,.1f} MB.",
        "## What it kept",
        _retention(facts.evaluation),
        f"Measured on {facts.evaluation.models[0].fidelity.tokens:,} tokens of held-out text. KL "
        "is KL(teacher ‖ model) in nats a token.",
        replay_sentence(replay),
        "## License",
        licenses_section(facts.origins),
        "## Limits",
        LIMITS,
        *(f"- {text}" for text in [*facts.notes, *replay.notes]),
        "## Where it comes from",
        f"Data: {facts.data}.",
        table(("what", "SHA-256 or key"), [*facts.hashes.items(), *files.items()]),
        f"```yaml\n{facts.recipe}```",
    ]
    return "\n\n".join(parts) + "\n"


def replay_sentence(replay: ReplayResult) -> str:
    return (
        f"This export differs from the checkpoint that was measured by {replay.kl:.2g} nats a "
        f"token and has {replay.top1_agreement:.1%} of its likeliest tokens, on "
        f"{replay.tokens:,} tokens."
    )


def _head(facts: CardFacts, replay: ReplayResult) -> dict[str, Any]:
    return {
        **origins_head(facts.origins),
        "pipeline_tag": "text-generation",
        "library_name": "gguf" if replay.format.startswith("gguf") else "transformers",
        "tags": TAGS,
    }


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
    return table(heads, rows)


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
