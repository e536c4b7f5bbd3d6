"""The stage that builds token windows from the recipe's sources."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillhouse.data.build_data import TOKENIZED, build
from stillhouse.data.data_config import DataRecipe
from stillhouse.data.sources import estimated_tokens, has_unknown_size, sources_fingerprint
from stillhouse.data.windows import Windows, open_windows
from stillhouse.errors import DataError
from stillhouse.language_model.job import Job
from stillhouse.runfolder import Outcome, Stage, StagePlan
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
        "recipe": section.model_dump(mode="json"),
        "seed": job.recipe.seed,
        "tokenizer": fingerprint,
        "sources": sources_fingerprint(files, job.base),
    }
    if text is not None:
        inputs["synthesized"] = text.sha256
    return StagePlan("data", inputs, work, VERSION, resumable=True, scratch=(TOKENIZED,))


def expected_tokens(section: DataRecipe, base: Path) -> int | None:
    """Estimate the number of training tokens before reading the text; None if neither the recipe
    nor the size of its text determines it. Raises DataError if the text is missing and the recipe
    does not set a number."""
    most, found = section.train_tokens, 0.0
    try:
        if not has_unknown_size(section.sources):
            found = estimated_tokens(section.sources, base)
    except DataError:
        if most is None:
            raise
    found -= 0 if section.heldout_sources else section.heldout_tokens
    if found <= 0:
        return most
    return round(found) if most is None else min(round(found), most)


def take_over_tokens(out: Path) -> None:
    """Continue with what was tokenized before the recipe or its files changed, so that correcting
    one document does not mean tokenizing the others again. out: the stage's half-written folder."""
    earlier = out.parent.glob(f".data-*.partial/{TOKENIZED}")
    found = sorted(earlier, key=lambda folder: folder.stat().st_mtime)
    if found and not (out / TOKENIZED).exists():
        found[-1].rename(out / TOKENIZED)


def open_data(data: Stage) -> tuple[Windows, Windows]:
    """Open the training and held-out windows of a finished data stage."""
    return open_windows(data.path / "train"), open_windows(data.path / "heldout")
