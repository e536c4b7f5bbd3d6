"""Answers new texts with a finished student."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.answering.answering_evaluation import (
    answers_in_order,
    read_json,
    request_for,
)
from stillhouse.answering.answering_export import AnsweringFacts
from stillhouse.generation.generator import TextGenerator
from stillhouse.generation.local_generator import LocalGenerator, open_local
from stillhouse.pipeline.kind import Rows
from stillhouse.synthesis.filters import json_schema

TOGETHER = 64


def answers_predictor(folder: Path) -> Callable[[Iterable[str]], Rows] | None:
    """A function that answers texts with the student in the folder; None if there is none.
    Raises ModelError."""
    if not (folder / AnsweringFacts.FILE).is_file():
        return None
    return partial(predicted_answers, open_local(folder), AnsweringFacts.load(folder))


def predicted_answers(
    generator: TextGenerator[LocalGenerator], facts: AnsweringFacts, texts: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each text, in order, with `text` and `answer`.

    For an extraction, a row also has `valid` and `value` (None if not valid). Raises ModelError.
    """
    validity = None if facts.json_schema is None else json_schema(facts.json_schema)
    texts = iter(texts)
    while some := list(itertools.islice(texts, TOGETHER)):
        requests = [request_for(facts.messages(t), "student", facts.max_tokens) for t in some]
        for text, answer in zip(some, answers_in_order(generator, requests), strict=True):
            row: dict[str, Any] = {"text": text, "answer": answer}
            if validity is not None:
                row["valid"], row["value"] = read_json(answer, validity)
            yield row
