"""The model card of a student for one task: what it is, how good, and what it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillhouse.export.licenses import CARD, Origin, licenses_section, origins_head
from stillhouse.export.model_card import LIMITS, TAGS, table, weight_hashes
from stillhouse.runfolder import write_atomically


@dataclass(frozen=True)
class TaskCard:
    """What the cards of one student tell, whatever the format.

    about: a paragraph each. models, measures: the table's columns, and its rows of a name and a
    cell for each. texts: that were measured on. remark: below the table. limits: beside those of
    every student. recipe: resolved YAML. hashes: of what the run started from, by name.
    """

    name: str
    pipeline: str
    origins: Sequence[Origin]
    about: list[str]
    models: list[str]
    measures: Sequence[tuple[str, list[str]]]
    texts: int
    data: str
    recipe: str
    hashes: dict[str, str]
    remark: str = ""
    limits: list[str] = field(default_factory=list)


def write_task_card(folder: Path, card: TaskCard, *, library: str, use: str, replay: str) -> None:
    """Writes it as README.md beside the exported files, which it names with their SHA-256.

    library: the Hub's name of what loads the folder. use: how. replay: what was found when the
    files were read again.
    """
    head: dict[str, Any] = {
        **origins_head(card.origins),
        "pipeline_tag": card.pipeline,
        "library_name": library,
        "tags": TAGS,
    }
    rows = [(name, *cells) for name, cells in card.measures]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {card.name}",
        *card.about,
        "## How to use it",
        use,
        "## How good it is",
        f"On {card.texts:,} test texts:",
        table(("", *card.models), rows),
        card.remark,
        replay,
        "## License",
        licenses_section(card.origins),
        "## Limits",
        LIMITS,
        "\n".join(f"- {limit}" for limit in card.limits),
        "## Where it comes from",
        f"Data: {card.data}.",
        table(("what", "SHA-256 or key"), [*card.hashes.items(), *weight_hashes(folder).items()]),
        f"```yaml\n{card.recipe}```",
    ]
    write_atomically(folder / CARD, "\n\n".join(part for part in parts if part) + "\n")
