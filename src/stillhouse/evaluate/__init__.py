"""What a run's models kept of the teacher, measured: fidelity, speed, memory, text, tasks."""

from stillhouse.evaluate.evaluate import evaluate
from stillhouse.evaluate.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.evaluate.generate import generate
from stillhouse.evaluate.results import Evaluation, Fidelity, Generation, ModelResult, Speed
from stillhouse.evaluate.speed import Rates, measure_peak_memory, measure_rates
from stillhouse.evaluate.table import perplexity_retention, retention_table, task_table
from stillhouse.evaluate.tasks import run_tasks

__all__ = [
    "Evaluation",
    "Fidelity",
    "Generation",
    "HeldoutAnswers",
    "ModelResult",
    "Rates",
    "Speed",
    "compare",
    "evaluate",
    "generate",
    "heldout_answers",
    "measure_peak_memory",
    "measure_rates",
    "perplexity_retention",
    "retention_table",
    "run_tasks",
    "task_table",
]
