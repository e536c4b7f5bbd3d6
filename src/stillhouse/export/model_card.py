"""Model cards: what a student is, how good it is, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillhouse import number_format as text
from stillhouse.atomic_files import write_atomically
from stillhouse.checksums import sha, write_sums
from stillhouse.evaluation.metrics_table import MetricsTable, to_markdown
from stillhouse.export.gate import ReplayResult
from stillhouse.export.licenses import CARD, Origin, licenses_section, origins_head
from stillhouse.markdown import fenced, inert

TAGS = ["distillation", "stillhouse"]
WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data")
LIMITS = (
    "The student inherits the teacher's errors and adds its own. On text that differs from the "
    "text it was distilled on, expect larger differences from the teacher than the table shows. "
    "Nothing else was measured, such as safety, other languages, or longer text."
)


@dataclass(frozen=True)
class ModelCard:
    """The content of a student's model cards that is common to all formats, as plain text, not
    Markdown.

    pipeline: the Hub's pipeline tag.
    origins: the teacher, followed by other models used.
    about: paragraphs about the student.
    data: describes the training data.
    recipe: the resolved recipe as YAML.
    hashes: hashes of the run's inputs, by name.
    limits: in addition to the limits of every student.
    """

    name: str
    pipeline: str
    origins: Sequence[Origin]
    about: list[str]
    metrics: MetricsTable
    data: str
    recipe: str
    hashes: dict[str, str]
    limits: list[str] = field(default_factory=list)


def write_card(
    folder: Path,
    card: ModelCard,
    *,
    library: str,
    replay: str,
    use: str = "",
    limits: Sequence[str] = (),
) -> None:
    """Write the card as README.md next to the exported files, and then SHA256SUMS. The card lists
    the SHA-256 of the weight files.

    library: the library that loads the folder, by its name on the Hub.
    replay: describes the result of replaying the files.
    use: how to use this format.
    limits: of this format.
    """
    head: dict[str, Any] = {
        **origins_head(card.origins),
        "pipeline_tag": card.pipeline,
        "library_name": library,
        "tags": TAGS,
    }
    weights = [file for kind in WEIGHTS for file in sorted(folder.glob(kind))]
    hashes = [*card.hashes.items(), *((file.name, sha(file)) for file in weights)]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {inert(card.name)}",
        *map(inert, card.about),
        *(["## How to use it", use] if use else []),
        "## Evaluation",
        to_markdown(card.metrics),
        replay,
        "## License",
        licenses_section(card.origins),
        "## Limits",
        LIMITS,
        "\n".join(f"- {inert(limit)}" for limit in [*card.limits, *limits]),
        "## Provenance",
        f"Data: {inert(card.data)}.",
        to_markdown(MetricsTable.of_text(["what", "SHA-256 or key"], hashes)),
        fenced(card.recipe, "yaml"),
    ]
    write_atomically(folder / CARD, "\n\n".join(part for part in parts if part) + "\n")
    write_sums(folder)


def write_language_model_card(
    folder: Path, card: ModelCard, replay: ReplayResult, use: str = ""
) -> None:
    """Write the card of a checkpoint or GGUF file that has passed its replay."""
    library = "gguf" if replay.format.startswith("gguf") else "transformers"
    sentence = (
        f"This export ({replay.format}, {replay.dtype}, {text.size(replay.bytes)}) has a KL of "
        f"{text.tiny(replay.kl)} nats/token to the evaluated checkpoint, and the same top-1 token "
        f"at {text.percent(replay.top1_agreement, 1)} of {replay.tokens:,} positions."
    )
    write_card(folder, card, library=library, replay=sentence, use=use, limits=replay.notes)
