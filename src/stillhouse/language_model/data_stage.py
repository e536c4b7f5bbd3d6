"""The stage that builds windows of tokens from the recipe's sources."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillhouse.data.build_data import TOKENIZED, build
from stillhouse.data.data_config import DataRecipe
from stillhouse.data.sources import sources_fingerprint
from stillhouse.data.windows import Windows, open_windows
from stillhouse.language_model.job import Job
from stillhouse.pipeline.stage_plan import StagePlan
from stillhouse.runfolder import Outcome, Stage
from stillhouse.teachers.load_model import load_tokenizer

VERSION = 6


def plan_data(job: Job) -> StagePlan:
    section, text = job.recipe.data, job.text
    read, files = section, [*section.sources, *section.heldout_sources]
    if text is not None:
        read, files = text.put_into(section, job.base), text.others(section, job.base)

    def work(out: Path) -> Outcome:
        tokenizer = load_tokenizer(job.tokenizer)
        take_over_tokens(out)
        train, heldout = build(
            read, tokenizer, seed=job.recipe.seed, base=job.base, out=out, resume=tokens_key
        )
        return Outcome(summary={"train": asdict(train.info), "heldout": asdict(heldout.info)})

    fingerprint = job.tokenizer.fingerprint
    tokens_key = f"{VERSION} {fingerprint}"
    inputs: dict[str, Any] = {
        "recipe": _key(section),
        "seed": job.recipe.seed,
        "tokenizer": fingerprint,
        "sources": sources_fingerprint(files, job.base),
    }
    if text is not None:
        inputs["synthesized"] = text.sha256
    return StagePlan("data", inputs, work, VERSION, resumable=True, scratch=(TOKENIZED,))


def _key(section: DataRecipe) -> dict[str, Any]:
    """The section without limits that are not set: stages that were finished before a source could
    have one stay finished."""
    found = section.model_dump(mode="json")
    for source in [*found["sources"], *found["heldout_sources"]]:
        if source["tokens"] is None:
            del source["tokens"]
    return found


def take_over_tokens(out: Path) -> None:
    """What was tokenized before the recipe or its files changed is continued: a document that had
    to be corrected does not cost the tokens of the others. out: the stage's half-written folder."""
    earlier = out.parent.glob(f".data-*.partial/{TOKENIZED}")
    found = sorted(earlier, key=lambda folder: folder.stat().st_mtime)
    if found and not (out / TOKENIZED).exists():
        found[-1].rename(out / TOKENIZED)


def open_data(data: Stage) -> tuple[Windows, Windows]:
    """Training and held-out windows of a finished data stage."""
    return open_windows(data.path / "train"), open_windows(data.path / "heldout")
