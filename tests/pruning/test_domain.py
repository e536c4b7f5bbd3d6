"""A note reports calibration text of a different domain than the held-out text, and its cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.pruning.calibrate import calibration_batches, unseen
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.reference import Domain, mean_kl, read_text
from stillhouse.students.build_student import build_student
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.model_source import resolve_model
from tests.teachers.toys import ToyWindows, save_model, tiny_model


def test_perplexity_and_kl_agree_with_their_definitions() -> None:
    windows = ToyWindows(count=4)
    model, pruned = tiny_model(), tiny_model()
    reference, perplexity = read_text(model, windows, 0, torch.float32)
    prune_model(pruned, windows, ffn_size=40)
    positions = windows.positions.expand(4, -1)
    inputs = {"input_ids": windows.ids, "position_ids": positions, "use_cache": False}
    p, q = (each(**inputs).logits.double().log_softmax(-1) for each in (model, pruned))
    # The first token of a document is not predicted from the document before it.
    follows = positions[:, 1:] > 0
    losses = -p[:, :-1].gather(-1, windows.ids[:, 1:, None])[..., 0][follows]
    assert perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert mean_kl(reference, pruned, torch.float32) == pytest.approx(expected, rel=1e-3)


def test_only_a_large_difference_in_perplexity_has_a_warning() -> None:
    assert Domain(30.0, 40.0, 0.1).warning() is None
    for first, second in ((30.0, 90.0), (90.0, 30.0)):
        warning = Domain(first, second, 0.123).warning()
        assert warning is not None
        assert "KL 0.123" in warning
        assert f"{second:.1f} on held-out text and {first:.1f} on calibration text" in warning


def test_a_cut_that_costs_much_more_on_the_held_out_text_has_a_warning() -> None:
    assert Domain(30.0, 40.0, 0.3, 0.2).warning() is None
    assert Domain(30.0, 40.0, 0.3, None).warning() is None
    # The ratio is large, but both costs are negligible.
    assert Domain(30.0, 40.0, 0.009, 0.0001).warning() is None
    warning = Domain(30.0, 40.0, 0.45, 0.2).warning()
    assert warning is not None
    assert "KL 0.200 on text like" in warning
    assert "0.450 on the held-out text" in warning


def test_unseen_windows_are_those_that_calibration_does_not_read() -> None:
    windows = ToyWindows()
    batches = calibration_batches(windows, 10 * 32, 5)
    rest = unseen(windows, 10 * 32, 5)
    rows = [*(ids for batch in batches for ids in batch.input_ids_RL.tolist())]
    rows += [rest[place]["input_ids"].tolist() for place in range(len(rest))]
    assert len(rest) == len(windows) - 10
    assert sorted(rows) == sorted(windows.ids.tolist())
    assert len(unseen(windows, 10**6, 5)) == 0


@pytest.mark.parametrize(("tokens", "some"), [(10 * 32, True), (10**6, False)])
def test_a_student_records_what_its_cut_costs_on_unseen_text(
    tmp_path: Path, tokens: int, some: bool
) -> None:
    save_model(tmp_path / "teacher")
    summary = build_student(
        PrunedStudent(start="pruned", ffn_size=40, calibration_tokens=tokens),
        teacher=resolve_model("teacher", base=tmp_path),
        windows=ToyWindows(),
        heldout=ToyWindows(seed=3),
        seed=0,
        base=tmp_path,
        out=tmp_path / "student",
    )
    found = summary["domain"]
    assert (found["unseen_kl"] is not None) == some
    if some:
        # Both texts are random tokens.
        assert found["unseen_kl"] == pytest.approx(found["heldout_kl"], rel=0.3)


class Familiar(ToyWindows):
    """Text that the tiny model generates greedily."""

    def __init__(self) -> None:
        super().__init__(count=8)
        model = tiny_model()
        for place in range(1, self.ids.shape[1]):
            logits = model(input_ids=self.ids[:, :place], use_cache=False).logits
            self.ids[:, place] = logits[:, -1].argmax(-1)
        self.positions = torch.arange(self.ids.shape[1])
        self.labels = self.ids.clone()


def test_a_student_pruned_on_text_of_a_different_domain_has_a_note(tmp_path: Path) -> None:
    save_model(tmp_path / "teacher")
    teacher = resolve_model("teacher", base=tmp_path)
    notes = {}
    for name, heldout in (("different", Familiar()), ("same", ToyWindows(seed=3))):
        summary = build_student(
            PrunedStudent(start="pruned", ffn_size=40),
            teacher=teacher,
            windows=ToyWindows(),
            heldout=heldout,
            seed=0,
            base=tmp_path,
            out=tmp_path / name,
        )
        notes[name] = [text for text in summary["notes"] if "a different domain" in text]
        assert summary["domain"]["heldout_kl"] > 0
    assert len(notes["different"]) == 1
    assert not notes["same"]
