"""A run that trains a classifier on a teacher's judgment: its stages, in order."""

from __future__ import annotations

from stillhouse.classify.classifier import classifier_predictor
from stillhouse.classify.classifier_evaluation import plan_classifier_evaluation
from stillhouse.classify.classifier_export import plan_classifier_export, plan_classifier_report
from stillhouse.classify.classify_check import (
    check_judgment,
    check_texts,
    check_training,
    judgment_spending,
    preview_task,
    require_classifier_export,
    require_student,
    require_task,
)
from stillhouse.classify.classify_job import TaskJob, find_task
from stillhouse.classify.classify_stages import (
    plan_classifier,
    plan_classifier_training,
    plan_gold_training,
    plan_judgment,
    plan_texts,
    with_gold,
)
from stillhouse.evaluation.classification_results import ClassificationEvaluation
from stillhouse.language_model.export_stage import EXPORT_PURPOSE, PUSH, shipped_folder
from stillhouse.pipeline.kind import Kind, Link, Step
from stillhouse.pipeline.report_stage import REPORT, report_step

STEPS = (
    Step(
        "texts",
        plan_texts,
        then=with_gold,
        require=require_task,
        check=check_texts,
        purpose="read the texts, and set some aside for calibration and for tests",
    ),
    # Before the judgment, so that nothing is spent if the student cannot be built.
    Step(
        "student",
        plan_classifier,
        ("texts",),
        require=require_student,
        purpose="build the classifier that training starts from",
    ),
    Step(
        "judgment",
        plan_judgment,
        ("texts",),
        check=check_judgment,
        spending=judgment_spending,
        purpose="let the teacher score the labels of every text",
    ),
    Step(
        "train",
        plan_classifier_training,
        ("texts", "judgment", "student"),
        check=check_training,
        purpose="train the classifier to match the teacher's label probabilities",
    ),
    Step(
        "baseline",
        plan_gold_training,
        ("texts", "student"),
        applies=lambda job: job.has_gold and job.recipe.evaluate.fine_tuning_baseline,
        purpose="train the same classifier on the reference labels, for comparison",
    ),
    Step(
        "evaluate",
        plan_classifier_evaluation,
        ("texts", "judgment", "student", "train", "baseline"),
        purpose="compare the classifiers with the teacher on the test texts",
    ),
    Step(
        "export",
        plan_classifier_export,
        ("texts", "train", "evaluate"),
        main_process=True,
        require=require_classifier_export,
        purpose=EXPORT_PURPOSE,
    ),
    PUSH,
    report_step(plan_classifier_report),
)


def _links(job: TaskJob) -> dict[str, Link]:
    forms = dict.fromkeys(("safetensors", *job.recipe.export.formats))
    exported = {name: ("export", name) for name in map(shipped_folder, forms)}
    return {**exported, REPORT: ("report", REPORT)}


CLASSIFY = Kind(
    name="classify",
    find=find_task,
    find_to_check=find_task,
    steps=STEPS,
    links=_links,
    load_evaluation=ClassificationEvaluation.load,
    preview=preview_task,
    predictor=classifier_predictor,
)
