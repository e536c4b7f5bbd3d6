"""A recipe's section `synthesize`, done: prompts are answered, filtered, and written as chats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError
from stillhouse.progress import note
from stillhouse.recipe.synthesize import FiltersRecipe, SynthesizeRecipe
from stillhouse.runfolder import write_atomically
from stillhouse.synthesis import filters
from stillhouse.synthesis.asking import (
    Asked,
    Origins,
    journal_path,
    text_teacher,
)
from stillhouse.synthesis.estimate import known_before
from stillhouse.synthesis.filters import Filter, Row, Sieve
from stillhouse.synthesis.journal import Journal
from stillhouse.synthesis.prompts import answer_text, read_prompts

TEXT, VICTIMS, SUMMARY = "synthetic.jsonl", "filtered.jsonl", "summary.json"


_PATHS = ("out", "victims", "journal")


@dataclass(frozen=True)
class Synthesis:
    """What was made. requests: prompts times samples. answered: of them, now in the journal.

    new: answered in this run. failed: given up in this run. kept: rows in `out`. taken: rows that
    each filter took. tokens, usd: of all answers, whichever run paid. unpriced: answers of unknown
    cost, which `usd` leaves out.
    """

    out: Path
    victims: Path
    journal: Path
    requests: int
    answered: int
    new: int
    failed: int
    kept: int
    tokens: int
    usd: float
    unpriced: int
    out_of_budget: bool
    taken: dict[str, int] = field(default_factory=dict)

    @property
    def cost(self) -> str:
        if self.unpriced == 0:
            return f"${self.usd:,.4f}"
        return "unknown" + (f" (${self.usd:,.4f} of it known)" if self.usd else "")

    def facts(self) -> dict[str, Any]:
        """All but the paths."""
        return {name: value for name, value in asdict(self).items() if name not in _PATHS}

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        missing = self.requests - self.answered
        rest = f", {missing:,} have none" if missing else ""
        rest += f" ({self.failed:,} given up now)" if self.failed else ""
        taken = ", ".join(f"{name} {count:,}" for name, count in self.taken.items() if count)
        return [
            ("answers", f"{self.answered:,} of {self.requests:,}, {self.new:,} of them new{rest}"),
            ("filtered", f"{taken or 'none'}  {self.victims if taken else ''}".rstrip()),
            ("tokens", f"{self.tokens:,}"),
            ("cost", self.cost),
            ("journal", str(self.journal)),
            ("rows", f"{self.kept:,}  {self.out}"),
        ]


def synthesize(section: SynthesizeRecipe, origins: Origins, *, seed: int = 0) -> Synthesis:
    """Answers what the journal has no answer to, and writes what the filters leave.

    Into origins.folder: TEXT with the rows in the order of the prompts, {"messages": [...]}, the
    answer last; VICTIMS, and SUMMARY. An exhausted budget ends the asking, not the rest.
    Raises DataError (prompts, or nothing is left), EndpointError, ModelError, RunError (journal,
    disk).
    """
    path = journal_path(section, origins)
    teacher = text_teacher(section, origins, seed)
    # A broken filter is found before anything is paid.
    chosen = chosen_filters(section.filters, origins.base)
    asked = Asked(section.prompts, origins.base, teacher.request)
    with Journal(path) as journal:
        known = known_before(asked.requests(), journal, teacher.price)
        if known.missing:
            new, failed, out_of_budget = teacher.answer(asked, journal, known)
        else:
            new, failed, out_of_budget = 0, 0, False
        rows = Rows(section, asked, journal)
        sieve = Sieve(chosen, origins.folder / VICTIMS)
        origins.folder.mkdir(parents=True, exist_ok=True)
        out = origins.folder / TEXT
        kept = _write(out, sieve.keep(rows))
    result = Synthesis(
        out=out,
        victims=sieve.victims,
        journal=path,
        requests=known.requests,
        answered=rows.answered,
        new=new,
        failed=failed,
        kept=kept,
        tokens=rows.tokens,
        usd=rows.usd,
        unpriced=rows.unpriced,
        out_of_budget=out_of_budget,
        taken=dict(sieve.taken),
    )
    facts = json.dumps({**result.facts(), "cost": result.cost}, indent=2)
    write_atomically(origins.folder / SUMMARY, facts)
    if out_of_budget:
        note("the budget is used up: raise synthesize.budget to go on where this stopped")
    if kept == 0:
        raise DataError(
            f"no row is left: {rows.answered} answers, and the filters took them all",
            where=result.victims,
            fix="look at what was taken and why, then loosen synthesize.filters",
        )
    return result


# --- rows ------------------------------------------------------------------------------------


class Rows:
    """The answered prompts as rows, in order; counts what it passes."""

    def __init__(self, section: SynthesizeRecipe, asked: Asked, journal: Journal) -> None:
        self.section, self.asked, self.journal = section, asked, journal
        self.answered = self.tokens = self.unpriced = 0
        self.usd = 0.0

    def __iter__(self) -> Iterator[Row]:
        frame, keep = self.asked.frame, self.section.reasoning == "keep"
        seen: set[bytes] = set()
        for prompt, request in self.asked.pairs():
            answer = self.journal.get(request.key)
            if answer is None:
                continue
            self.answered += 1
            digest = bytes.fromhex(request.key)[:16]
            if digest not in seen:  # a prompt that is in the file twice was paid for once
                seen.add(digest)
                self.tokens += (answer.prompt_tokens or 0) + (answer.completion_tokens or 0)
                self.usd += answer.cost or 0.0
                self.unpriced += answer.cost is None
            yield Row(
                frame.taught(prompt),
                answer_text(answer, keep_reasoning=keep),
                answer.finish_reason,
                prompt.where,
                request.sample,
            )


def _write(out: Path, rows: Iterable[Row]) -> int:
    """Writes the rows under a temporary name, then renames: the file is whole or the old one."""
    temporary = out.with_name(f".{out.name}.tmp")
    kept = 0
    with temporary.open("w", encoding="utf-8", errors="replace") as file:
        for row in rows:
            messages = [*row.messages, {"role": "assistant", "content": row.text}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            kept += 1
    temporary.replace(out)
    return kept


def chosen_filters(section: FiltersRecipe, base: Path) -> dict[str, Filter]:
    """The recipe's filters by name, the cheap ones first. Raises RecipeError, DataError."""
    chosen: dict[str, Filter] = {"empty": filters.empty}
    if section.truncated:
        chosen["truncated"] = filters.truncated
    if section.refusals:
        chosen["refusals"] = filters.refusal
    if section.min_characters is not None or section.max_characters is not None:
        chosen["length"] = filters.length(section.min_characters, section.max_characters)
    if section.require_pattern is not None:
        chosen["require_pattern"] = filters.pattern(section.require_pattern)
    if section.forbid_pattern is not None:
        chosen["forbid_pattern"] = filters.pattern(section.forbid_pattern, wanted=False)
    if section.json_schema is not None:
        schema = filters.read_schema(base / Path(section.json_schema).expanduser())
        chosen["json_schema"] = filters.json_schema(schema)
    if section.decontaminate is not None:
        texts = section.decontaminate
        path = base / Path(texts.path).expanduser()
        items = read_prompts(path, format=texts.format, key=texts.key)
        chosen["decontaminate"] = filters.decontaminate(items, texts.ngram)
    if section.exact_duplicates:
        chosen["exact_duplicates"] = filters.exact_duplicates()
    if section.near_duplicates is not None:
        chosen["near_duplicates"] = filters.near_duplicates(section.near_duplicates)
    return chosen
