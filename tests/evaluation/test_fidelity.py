"""Fast metrics agree with a reference that computes one token at a time in float64."""

from __future__ import annotations

import gc
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.errors import DataError, ModelError
from stillhouse.evaluation import fidelity
from stillhouse.evaluation.fidelity import HeldoutAnswers, compare, heldout_answers
from stillhouse.evaluation.results import Fidelity
from stillhouse.signals import DenseSignal, LMHead
from stillhouse.teachers.load_model import load_model

from .toys import VOCABULARY, mixed_windows, random_documents, toy_model, window


def reference(model: Any, teacher: Any, windows: list[dict[str, Tensor]], vocabulary: int) -> Any:
    """Every document alone, every token alone, every probability by exp and sum, in float64."""
    model, teacher = model.double(), teacher.double()
    nll = kl = 0.0
    agree = tokens = 0
    bins: list[list[tuple[float, float]]] = [[] for _ in range(15)]
    for item in windows:
        starts = [i for i, position in enumerate(item["position_ids"].tolist()) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
            for t in range(start + 1, end):
                label = int(item["labels"][t])
                if label == -100:
                    continue
                prefix = item["input_ids"][None, start:t]
                with torch.no_grad():
                    p = probabilities(teacher(prefix).logits[0, -1, :vocabulary].tolist())
                    q = probabilities(model(prefix).logits[0, -1, :vocabulary].tolist())
                tokens += 1
                nll -= math.log(q[label])
                kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                agree += q.index(max(q)) == p.index(max(p))
                index = math.ceil(max(q) * 15) - 1
                bins[index].append((max(q), float(q.index(max(q)) == label)))
    error = sum(
        len(rows) / tokens * abs(mean([c for c, _ in rows]) - mean([r for _, r in rows]))
        for rows in bins
        if rows
    )
    model.float(), teacher.float()
    return Fidelity(math.exp(nll / tokens), kl / tokens, agree / tokens, error, tokens)


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measure(model: Any, teacher: Any, windows: Any, vocabulary: int = VOCABULARY) -> Fidelity:
    return compare(heldout_answers(model, windows), heldout_answers(teacher, windows), vocabulary)


def assert_close(left: Fidelity, right: Fidelity, tolerance: float = 1e-5) -> None:
    assert left.tokens == right.tokens
    for name in ("perplexity", "kl", "top1_agreement", "calibration_error"):
        assert getattr(left, name) == pytest.approx(getattr(right, name), rel=tolerance), name


@pytest.mark.parametrize("rows", [1, 7, 128])
@pytest.mark.parametrize("tokens", [1, 32, 2048])
def test_every_chunking_matches_the_slow_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int
) -> None:
    monkeypatch.setattr(fidelity, "ROWS_PER_CHUNK", rows)
    monkeypatch.setattr(fidelity, "TOKENS_PER_FORWARD", tokens)
    teacher, model = toy_model(0), toy_model(1, layers=3)
    expected = reference(model, teacher, mixed_windows(), VOCABULARY)
    assert_close(measure(model, teacher, mixed_windows()), expected)
    assert expected.kl > 0.1
    assert 0.0 < expected.top1_agreement < 1.0


def test_the_teacher_compared_with_itself_is_perfect() -> None:
    teacher = toy_model()
    answers = heldout_answers(teacher, mixed_windows())
    itself = compare(answers, answers, VOCABULARY)
    twin = measure(toy_model(), teacher, mixed_windows())
    assert itself.kl == twin.kl == 0.0
    assert itself.top1_agreement == twin.top1_agreement == 1.0
    assert_close(itself, reference(teacher, teacher, mixed_windows(), VOCABULARY))


def test_packed_documents_do_not_see_each_other() -> None:
    documents = random_documents(7, 6, 8, 5)
    teacher, model = toy_model(0), toy_model(1)
    packed = measure(model, teacher, [window(documents)])
    alone = measure(model, teacher, [window([document]) for document in documents])
    assert_close(packed, alone)


def test_padding_of_the_vocabulary_is_not_compared() -> None:
    """The wide student's extra rows have the highest logits of all, and must not count."""
    teacher, model = toy_model(0), toy_model(1)
    wide = toy_model(2, vocabulary=VOCABULARY + 6)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.full((6, 32), 9.0)])
    wide.load_state_dict(state)
    assert_close(measure(wide, teacher, mixed_windows()), measure(model, teacher, mixed_windows()))
    assert_close(
        measure(model, wide, mixed_windows()),
        reference(model, wide, mixed_windows(), VOCABULARY),
    )


def hand_made(probabilities_NV: list[list[float]], targets: list[int]) -> HeldoutAnswers:
    """Answers whose hidden states are the logits, with an LM head that is the identity."""
    hidden_ND = torch.tensor(probabilities_NV).log()
    head = LMHead(torch.eye(hidden_ND.shape[1]))
    return HeldoutAnswers(DenseSignal(hidden_ND, head), torch.tensor(targets), (len(targets),))


def test_calibration_error_agrees_with_a_hand_made_example() -> None:
    """Bins are 1/15 wide: 0.61 and 0.65 are in (0.6, 0.667], 0.4 and 0.95 in bins of their own."""
    rows = [[0.61, 0.3, 0.09], [0.65, 0.3, 0.05], [0.95, 0.04, 0.01], [0.25, 0.35, 0.4]]
    answers = hand_made(rows, [0, 1, 0, 2])
    measured = compare(answers, answers, 3)
    first = 2 / 4 * abs((0.61 + 0.65) / 2 - 1 / 2)
    last = 1 / 4 * abs(0.95 - 1)
    low = 1 / 4 * abs(0.4 - 1)
    assert measured.calibration_error == pytest.approx(first + last + low, abs=1e-6)
    assert measured.perplexity == pytest.approx((0.61 * 0.3 * 0.95 * 0.4) ** (-1 / 4), rel=1e-6)


def test_kl_is_from_the_teacher_to_the_model() -> None:
    teacher = hand_made([[0.5, 0.25, 0.25]], [0])
    model = hand_made([[0.25, 0.25, 0.5]], [0])
    skewed = hand_made([[0.8, 0.1, 0.1]], [0])
    assert compare(model, teacher, 3).kl == pytest.approx(0.25 * math.log(2), rel=1e-5)
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    assert compare(skewed, teacher, 3).kl == pytest.approx(expected, rel=1e-5)


def test_scale_bias_and_soft_cap_of_a_head_are_applied() -> None:
    hidden_ND = torch.tensor([[1.0, 2.0, -1.0]])
    head = LMHead(torch.eye(3), torch.tensor([0.5, 0.0, 0.0]), scale=2.0, softcap=3.0)
    answers = HeldoutAnswers(DenseSignal(hidden_ND, head), torch.tensor([0]), (1,))
    capped = [3 * math.tanh(value / 3) for value in (3.0, 4.0, -2.0)]
    expected = 1 / probabilities(capped)[0]
    assert compare(answers, answers, 3).perplexity == pytest.approx(expected, rel=1e-5)


def test_bfloat16_models_are_compared_in_float32() -> None:
    """A model with bfloat16 hidden states must not have bfloat16 logits, which have ties."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(64, 16, generator=generator).bfloat16()
    weight_VD = torch.randn(100, 16, generator=generator).bfloat16()
    targets = torch.randint(0, 100, (64,), generator=generator)
    low = HeldoutAnswers(DenseSignal(hidden_ND, LMHead(weight_VD)), targets, (len(targets),))
    high = HeldoutAnswers(
        DenseSignal(hidden_ND.float(), LMHead(weight_VD.float())), targets, (len(targets),)
    )
    assert compare(low, high, 100) == compare(high, high, 100)


def test_answers_contain_hidden_states_instead_of_logits() -> None:
    advanced: list[int] = []
    answers = heldout_answers(toy_model(), mixed_windows(), advance=advanced.append)
    assert answers.signal.hidden_ND.shape == (len(answers.targets_N), 32)
    assert sum(advanced) == sum(len(item["input_ids"]) for item in mixed_windows())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_answers_apart_do_not_keep_the_checkpoint_mapped(tmp_path: Path) -> None:
    """The file's pages would otherwise stay in memory as long as the head."""
    toy_model(0).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    answers = heldout_answers(model, mixed_windows())
    apart = answers.apart()
    assert torch.equal(apart.signal.head.weight_VD, answers.signal.head.weight_VD)
    assert compare(apart, apart, VOCABULARY) == compare(answers, answers, VOCABULARY)
    mapped = Path("/proc/self/maps")
    assert str(tmp_path) in mapped.read_text()
    del model, answers
    gc.collect()
    assert str(tmp_path) not in mapped.read_text()


def test_text_without_a_label_is_an_error() -> None:
    with pytest.raises(DataError, match="every label is masked"):
        heldout_answers(toy_model(), [window(random_documents(1, 6), masked=6)])
    with pytest.raises(DataError, match="no token to predict"):
        heldout_answers(toy_model(), [])


def test_a_vocabulary_that_does_not_match_is_an_error() -> None:
    answers = heldout_answers(toy_model(), mixed_windows())
    with pytest.raises(ModelError, match=r"predicts 14 tokens.*has 15"):
        compare(answers, answers, VOCABULARY + 1)
    with pytest.raises(DataError, match="token 13"):
        compare(answers, answers, 5)


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = toy_model()
    model.model.norm.weight.data[0] = float("nan")
    answers = heldout_answers(model, mixed_windows())
    with pytest.raises(ModelError, match="not finite"):
        compare(answers, heldout_answers(toy_model(), mixed_windows()), VOCABULARY)
