"""Text from teachers: prompts answered by an API or a local model, journaled and filtered."""

from stillhouse.synthesis.asking import Known, Origins, foreseen
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
