"""One job for a small model: a teacher's judgment of texts, distilled into a classifier."""

from stillhouse.tasks.classifier import Classifier, load_classifier
from stillhouse.tasks.predict import open_classifier, predictions
from stillhouse.tasks.run import TaskResult, run_task
from stillhouse.tasks.scoring import score_labels

__all__ = [
    "Classifier",
    "TaskResult",
    "load_classifier",
    "open_classifier",
    "predictions",
    "run_task",
    "score_labels",
]
