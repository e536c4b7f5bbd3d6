"""Text from teachers: prompts answered by an API or a local model, journaled and filtered."""

from stillhouse.synthesis.asking import Origins
from stillhouse.synthesis.estimate import Known
from stillhouse.synthesis.foresee import foreseen
from stillhouse.synthesis.journal import Journal
from stillhouse.synthesis.request import Answer, Failure, Request
from stillhouse.synthesis.run import Synthesis, synthesize

__all__ = [
    "Answer",
    "Failure",
    "Journal",
    "Known",
    "Origins",
    "Request",
    "Synthesis",
    "foreseen",
    "synthesize",
]
