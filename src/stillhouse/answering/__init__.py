"""A small language model that answers as a teacher does: JSON by a schema, or free text."""

from stillhouse.answering.run import AnsweringResult, run_answering

__all__ = ["AnsweringResult", "run_answering"]
