"""The experiments of bench/cross_tokenizer.py on tiny models, and the losses they compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import common, cross_tokenizer
from bench.cross_tokenizer_starts import wikitext_articles
from bench.cross_tokenizer_training import sides
from bench.sorted_losses import Gold, Side, sorted_distance, uld

from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.backbone import hidden_states
from stillhouse.teachers.local_teacher import LocalTeacher
from tests import tiny
from tests.teachers.test_aligned_teacher import batch_of
from tests.teachers.tokenizer_toys import byte_level


def options(folder: Path, *more: str) -> list[str]:
    for name, words in (("own", byte_level(300)), ("other", byte_level(330, seed=1))):
        model = tiny.llama(seed=3, vocab_size=len(words))
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n\n".join(tiny.text(60, seed) for seed in range(40)))
    questions = [json.dumps({"question": tiny.text(3, seed)}) for seed in range(30)]
    (folder / "questions.jsonl").write_text("\n".join(questions))
    numbers = {
        "tokens": 1500,
        "random-tokens": 1500,
        "context": 64,
        "heldout-tokens": 512,
        "calibration-tokens": 512,
        "ffn-size": 32,
        "kept": 290,
        "random-vocabulary": 280,
        "random-width": 24,
    }
    given = [part for key, value in numbers.items() for part in (f"--{key}", str(value))]
    paths = ["--student", str(folder / "own"), "--teacher", str(folder / "other")]
    paths += ["--questions", str(folder / "questions.jsonl"), "--folder", str(folder / "run")]
    return [str(folder / "text.txt"), *paths, *given, "--seeds", "0", *more]


@pytest.mark.slow
def test_every_setting_of_every_experiment_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    cross_tokenizer.main(options(tmp_path, "--experiments", *cross_tokenizer.EXPERIMENTS))
    result = json.loads((tmp_path / "cross_tokenizer.json").read_text())
    assert result["figures"]["missing"] == []
    found = result["figures"]["models"]
    start = found["other-0/start"]["bits_per_byte"]
    for setting in ("cross_entropy", "uld", "gold", "fold", "fold_and_chunks", "own_teacher"):
        assert found[f"other-0/{setting}"]["bits_per_byte"] != start
    assert found["cut-0/fold"]["questions"]["kl"] < found["cut-0/start"]["questions"]["kl"]
    assert len(result["bars"]) == 10


def test_results_with_different_options_cannot_be_combined(tmp_path: Path) -> None:
    given = options(tmp_path)
    cross_tokenizer.require_same_options(cross_tokenizer.parsed(given))
    with pytest.raises(SystemExit, match="other values of tokens"):
        cross_tokenizer.require_same_options(cross_tokenizer.parsed([*given, "--tokens", "2000"]))


def test_wikitext_articles_become_documents_in_normal_orthography() -> None:
    text = (
        " = Lobster = \n \n"
        ' It weighs 1 @.@ 5 kg ( 3 lb ) , and is called " red " , or " blue " . A <unk> one . \n'
        " = = Habitat = = \n \n"
        " It isn 't well @-@ known ; the cook 's pot is : big . \n"
        " = <unk> Bay = \n \n It is a bay . \n"
    )
    lobster = (
        'It weighs 1.5 kg (3 lb), and is called "red", or "blue".\n\n'
        "It isn't well-known; the cook's pot is: big."
    )
    assert wikitext_articles(text) == [lobster, "It is a bay."]


@torch.no_grad()
def chunks_of(student: LocalTeacher, teacher: LocalTeacher) -> tuple[Side, Side, AlignedTeacher]:
    """Both models' views of the same chunks."""
    aligned = AlignedTeacher(teacher, student.tokenizer)
    batch = batch_of(student.tokenizer)
    hidden_RLD = hidden_states(student.model, batch["input_ids"], batch["position_ids"])
    return *sides(batch, hidden_RLD.flatten(0, 1), student.head, aligned, teacher), aligned


def model_of(words: Any) -> LocalTeacher:
    return LocalTeacher(tiny.llama(0, vocab_size=len(words)).double(), words)


@pytest.mark.parametrize("bytes_first", [True, False])
def test_a_merged_distribution_is_the_first_tokens_times_the_probability_of_the_rest(
    bytes_first: bool,
) -> None:
    words = [tiny.tokenizer(), byte_level(300)]
    student, teacher, _ = chunks_of(*map(model_of, words if bytes_first else words[::-1]))
    assert int((student if bytes_first else teacher).count_G.max()) > 1
    for side in (student, teacher):
        found_GV = side.merged(slice(None))
        for chunk in range(len(side.first_G)):
            row, count = int(side.first_G[chunk]), int(side.count_G[chunk])
            log_p = [
                (side.hidden_PD[row + i] @ side.head.weight_VD.T).log_softmax(0)
                for i in range(count)
            ]
            rest = sum(log_p[i][side.targets_P[row + i]] for i in range(1, count))
            expected_V = log_p[0].exp() * torch.as_tensor(rest).exp()
            torch.testing.assert_close(found_GV[chunk], expected_V)


def test_the_uld_distance_to_a_permuted_vocabulary_is_zero() -> None:
    p_GV = torch.rand(3, 7, dtype=torch.float64).softmax(1)
    assert float(sorted_distance(p_GV, p_GV[:, torch.randperm(7)])) == 0
    expected = sum(
        abs(p - q)
        for row, other in zip(p_GV.numpy(), p_GV.flip(0).numpy(), strict=True)
        for p, q in zip(np.sort(row), np.sort(other), strict=True)
    )
    assert float(sorted_distance(p_GV, p_GV.flip(0))) == pytest.approx(expected)


def test_gold_compares_equal_strings_by_jsd_and_sorts_the_rest() -> None:
    gold = Gold(student_M=torch.tensor([0, 2]), teacher_M=torch.tensor([1, 3]))
    q_GV = torch.tensor([[0.5, 0.1, 0.4]], dtype=torch.float64)
    p_GW = torch.tensor([[0.2, 0.3, 0.1, 0.4]], dtype=torch.float64)

    def half(p: float, q: float) -> float:
        m = (p + q) / 2
        return (p * np.log(p / m) + q * np.log(q / m)) / 2

    matched = half(0.3, 0.5) + half(0.4, 0.4)
    rest = abs(0.2 - 0.1) + abs(0.1 - 0.0)
    assert float(gold.distance(q_GV, p_GW)) == pytest.approx(0.5 * matched + 0.5 * rest)


def test_both_losses_are_zero_for_equal_models_unless_shifted_by_one_position() -> None:
    model = model_of(byte_level(300))
    ours, theirs, aligned = chunks_of(model, model)
    words = aligned.aligner
    gold = Gold.of(words.student, words.teacher, words.partners[0])
    shifted = replace(ours, first_G=ours.first_G + 1)
    for loss in (uld, gold):
        assert float(loss(ours, theirs, slice(None)).detach()) == pytest.approx(0, abs=1e-6)
        assert float(loss(shifted, theirs, slice(0, 8)).detach()) > 0.01
