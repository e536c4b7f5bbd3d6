"""Labels for new texts, from a finished classifier: JSON lines in, JSON lines out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.classify.classifier import FACTS, Classifier, load_classifier
from stillhouse.hardware import choose_precision
from stillhouse.pipeline.kind import Rows

TOGETHER = 256


def classifier_predictor(folder: Path) -> Callable[[Iterable[str]], Rows] | None:
    """A function that labels texts with the classifier in the folder; None if there is none."""
    if not (folder / FACTS).is_file():
        return None
    dtype = choose_precision("auto").dtype
    return partial(predictions, load_classifier(folder, dtype=dtype))


def predictions(classifier: Classifier, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """In the order of the texts: text, label, confidence, probabilities, abstain.

    abstain: whether the confidence is below the threshold that the run chose; None without one.
    """
    texts = iter(texts)
    threshold = classifier.facts.threshold
    while some := list(itertools.islice(texts, TOGETHER)):
        p_NC = classifier.probabilities(some)
        for text, p_C in zip(some, p_NC.tolist(), strict=True):
            best = max(range(len(p_C)), key=p_C.__getitem__)
            yield {
                "text": text,
                "label": classifier.labels[best],
                "confidence": round(p_C[best], 6),
                "abstain": None if threshold is None else p_C[best] < threshold,
                "probabilities": {
                    label: round(p, 6) for label, p in zip(classifier.labels, p_C, strict=True)
                },
            }
