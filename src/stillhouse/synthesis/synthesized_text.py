"""Uses synthesized text as training data, for sources of `data` that name its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillhouse.data.data_config import DataRecipe, FileSource, Source


@dataclass(frozen=True)
class SynthesizedText:
    """Synthesized text.

    out: the absolute path by which a recipe names the text. file: this run's copy. sha256: the
    hash of its content.
    """

    out: Path
    file: Path
    sha256: str

    def others(self, section: DataRecipe, base: Path) -> list[Source]:
        """The sources that read other text."""
        sources = [*section.sources, *section.heldout_sources]
        return [source for source in sources if not names(source, self.out, base)]

    def put_into(self, section: DataRecipe, base: Path) -> DataRecipe:
        """Replace `out`, which a different run could change, with this run's file."""

        def own(sources: list[Source]) -> list[Source]:
            change = {"path": str(self.file.absolute())}
            return [
                source.model_copy(update=change) if names(source, self.out, base) else source
                for source in sources
            ]

        read, held_out = own(section.sources), own(section.heldout_sources)
        return section.model_copy(update={"sources": read, "heldout_sources": held_out})


def names(source: Source, out: Path, base: Path) -> bool:
    """Whether the source is exactly this file, not a folder or pattern that includes it."""
    if not isinstance(source, FileSource):
        return False
    return (base / source.path).resolve() == out.resolve()


def reads(section: DataRecipe, out: Path, base: Path) -> bool:
    """Whether any source names the file."""
    return any(names(source, out, base) for source in [*section.sources, *section.heldout_sources])
