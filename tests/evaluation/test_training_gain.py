"""Training that does not bring the student closer to its teacher leads to a warning."""

from __future__ import annotations

from stillhouse.evaluation.metrics import metrics_of
from stillhouse.evaluation.results import Evaluation, Fidelity, ModelResult, farther_after_training


def models(**kl: float) -> list[ModelResult]:
    return [ModelResult(role, 10, 8, 20, Fidelity(9.0, kl[role], 0.5, 0.1, 99)) for role in kl]


def test_training_that_raises_the_kl_has_a_warning_with_both_values() -> None:
    (sentence,) = farther_after_training(models(teacher=0.0, untrained=0.156, student=0.163))
    assert "no closer to the teacher after training" in sentence
    assert "is 0.163 nats/token, compared with 0.156 before" in sentence
    assert "train.learning_rate" in sentence
    assert "data.train_tokens" in sentence


def test_training_that_lowers_the_kl_has_no_warning() -> None:
    assert not farther_after_training(models(teacher=0.0, untrained=0.2, student=0.1))
    assert not farther_after_training(models(teacher=0.0, student=0.1))


def test_the_warning_on_quantization_aware_training_names_its_own_keys() -> None:
    kl = {"untrained": 0.3, "student": 0.2, "quantized": 0.25, "quantized_trained": 0.25}
    (sentence,) = farther_after_training(models(**kl))
    assert "quantize.qat.learning_rate" in sentence


def test_the_table_says_how_much_larger_the_kl_is() -> None:
    found = Evaluation(models(teacher=0.0, untrained=0.2, student=0.23, quantized=0.1), [])
    (row,) = [row for row in metrics_of(found).rows if row.name.startswith("KL to the teacher")]
    assert [cell.remark for cell in row.cells] == [
        "",
        "15% more than untrained",
        "",
        "50% of the gap closed",
    ]
