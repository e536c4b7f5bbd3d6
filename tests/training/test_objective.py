"""Objectives with several terms: references, scheduled weights, and trained projections."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stillhouse.data.batches import collate
from stillhouse.errors import SignalError
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.teachers.load_model import load_config, load_model
from stillhouse.training.checkpoints import read_metrics
from stillhouse.training.distillation import PROJECTIONS, same_document
from stillhouse.training.objective import objective_for
from tests import tiny
from tests.training.conftest import Setting
from tests.training.test_train import run

pytestmark = pytest.mark.run

HIDDEN = {"kind": "hidden_states", "weight": 0.3, "embeddings": True}
COSINE = {"kind": "hidden_states", "distance": "cosine", "pairs": [[1, 3]]}
RELATIONS = {"kind": "attention_relations", "heads": 2, "weight": 0.2, "pairs": [[1, 2], [2, 3]]}
LAYER_LOGITS = {"divergence": "jsd", "layers": [1], "weight": 0.5}


def objective(folder: Path, *terms: Mapping[str, Any]) -> ObjectiveRecipe:
    found = tiny.parsed(tiny.recipe(folder, objective={"terms": list(terms)})).objective
    assert found is not None
    return found


@torch.no_grad()
def row_means(setting: Setting, terms: ObjectiveRecipe) -> dict[str, float]:
    """The mean of each term before training, computed row by row in plain PyTorch."""
    assert setting.teacher is not None
    student = load_model(setting.student, dtype=torch.float32)
    teacher = load_model(setting.teacher, dtype=torch.float32)
    made = objective_for(terms, student.config, teacher.config)
    sums = {"hidden mse": 0.0, "hidden cosine": 0.0, "attention relations": 0.0, "jsd@layer1": 0.0}
    rows = 0
    for number in range(len(setting.windows)):
        window = setting.windows[number]
        seen = [_everything(model, window) for model in (student, teacher)]
        predicting = [t - 1 for t in range(1, len(window["labels"])) if window["labels"][t] != -100]
        for t in predicting:
            rows += 1
            for hidden in made.hidden:
                sums[hidden.name] += _distance(hidden.loss, seen[0]["layers"], seen[1]["layers"], t)
            log_p = teacher.lm_head(seen[1]["layers"][-1][t]).log_softmax(-1)
            log_q = student.lm_head(student.model.norm(seen[0]["layers"][1][t])).log_softmax(-1)
            log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
            for log_x in (log_p, log_q):
                sums["jsd@layer1"] += 0.5 * float((log_x.exp() * (log_x - log_m)).sum())
            for relation in made.relations:
                for i, j in relation.pairs:
                    kl = _relation_kl(seen[0]["qkv"][i - 1], seen[1]["qkv"][j - 1], window, t)
                    sums[relation.name] += kl / len(relation.pairs)
    return {name: value / rows for name, value in sums.items()}


def _everything(model: Any, window: dict[str, Tensor]) -> dict[str, Any]:
    caught: list[dict[str, Tensor]] = []
    for layer in model.model.layers:
        caught.append({})
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            projection.register_forward_hook(
                lambda _m, _i, output, here=caught[-1], name=name: here.update({name: output[0]})
            )
    output = model(
        input_ids=window["input_ids"][None],
        position_ids=window["position_ids"][None],
        output_hidden_states=True,
        use_cache=False,
    )
    return {"layers": [hidden[0] for hidden in output.hidden_states], "qkv": caught}


def _distance(loss: Any, student: list[Tensor], teacher: list[Tensor], t: int) -> float:
    values = []
    for number, (i, j) in enumerate(loss.pairs):
        mapped = student[i][t]
        if len(loss.projections):
            mapped = loss.projections[number].weight @ mapped
        if loss.kind == "mse":
            values.append(float((mapped - teacher[j][t]).square().mean()))
        else:
            values.append(1 - float(torch.cosine_similarity(mapped, teacher[j][t], dim=0)))
    return sum(values) / len(values)


def _relation_kl(
    student: dict[str, Tensor], teacher: dict[str, Tensor], window: Any, t: int
) -> float:
    start = t - int(window["position_ids"][t])
    total = 0.0
    for name in ("q_proj", "k_proj", "v_proj"):
        for head in range(2):
            logs = []
            for states in (student, teacher):
                part = states[name].chunk(2, dim=1)[head]
                scores = part[start : t + 1] @ part[t] / part.shape[1] ** 0.5
                logs.append(scores.log_softmax(0))
            log_q, log_p = logs
            total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / 6


def test_every_term_matches_its_reference(narrow: Setting, tmp_path: Path) -> None:
    terms = objective(tmp_path, HIDDEN, COSINE, RELATIONS, LAYER_LOGITS)
    everything = len(narrow.windows)
    sizes = {"batch_size": everything, "micro_batch_size": everything // 3, "max_steps": 1}
    sizes["batch_size"] = 3 * sizes["micro_batch_size"]
    first = Setting(
        narrow.student, narrow.teacher, _First(narrow.windows, sizes["batch_size"]), narrow.heldout
    )
    run(first, tmp_path / "out", terms, **sizes)
    row = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    expected = row_means(first, terms)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-4), name
    weighted = (0.3, 1.0, 0.2, 0.5)
    assert row["loss"] == pytest.approx(
        sum(w * v for w, v in zip(weighted, expected.values(), strict=True)), rel=1e-4
    )


class _First:
    """The first windows of a set."""

    def __init__(self, windows: Any, count: int) -> None:
        self.windows, self.count = windows, count
        self.context, self.path = windows.context, windows.path
        self.supervised_tokens = windows.supervised_tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.count:
            raise IndexError(index)
        return self.windows[index]


def test_weights_follow_their_schedules(setting: Setting, tmp_path: Path) -> None:
    falling = {"divergence": "reverse_kl", "schedule": {"start": 2.0, "end": 0.0}}
    rising = {"kind": "hidden_states", "schedule": {"start": 0, "end": 1, "begin": 0.25}}
    run(setting, tmp_path / "out", objective(tmp_path, falling, rising), max_steps=4)
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    weights = [(2.0, 0.0), (1.5, 0.0), (1.0, 1 / 3), (0.5, 2 / 3)]
    for row, (of_kl, of_hidden) in zip(rows, weights, strict=True):
        expected = of_kl * row["reverse_kl"] + of_hidden * row["hidden mse"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)


def test_projections_are_trained_but_not_part_of_the_saved_student(
    narrow: Setting, tmp_path: Path
) -> None:
    trained = run(narrow, tmp_path / "out", objective(tmp_path, {}, HIDDEN), checkpoint_every=2)
    assert trained.keys() == load_file(narrow.student / "model.safetensors").keys()
    files = [tmp_path / "out" / "checkpoints" / f"checkpoint-{n}" for n in (2, 4)]
    early, late = (load_file(file / PROJECTIONS) for file in files)
    assert len(late) == 3  # the embeddings and two blocks
    assert all(not torch.equal(early[name], late[name]) for name in late)
    assert not (tmp_path / "out" / "model" / PROJECTIONS).exists()
    assert load_file(files[1] / "model.safetensors").keys() == trained.keys()


def test_projections_survive_a_resume_bit_for_bit(narrow: Setting, tmp_path: Path) -> None:
    terms = objective(tmp_path, {}, HIDDEN, RELATIONS)
    whole = run(narrow, tmp_path / "whole", terms, checkpoint_every=2)
    shutil.copytree(
        tmp_path / "whole" / "checkpoints" / "checkpoint-2",
        tmp_path / "resumed" / "checkpoints" / "checkpoint-2",
    )
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "resumed")
    resumed = run(narrow, tmp_path / "resumed", terms, checkpoint_every=2)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gradient_checkpointing_does_not_change_the_weights(
    narrow: Setting, tmp_path: Path
) -> None:
    terms = objective(tmp_path, {}, HIDDEN, RELATIONS, LAYER_LOGITS)
    plain = run(narrow, tmp_path / "plain", terms)
    spared = run(narrow, tmp_path / "spared", terms, gradient_checkpointing=True)
    for name in plain:
        torch.testing.assert_close(spared[name], plain[name], rtol=1e-4, atol=2e-6)


def test_attention_relations_do_not_cross_documents() -> None:
    windows = [{"input_ids": torch.zeros(5), "labels": torch.zeros(5)}]
    windows[0]["position_ids"] = torch.tensor([0, 1, 0, 1, 2])
    mask_LL = same_document(collate(windows)["position_ids"])[0]
    seen = {(i, j) for i, j in mask_LL.nonzero().tolist()}
    assert seen == {(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4)}


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"kind": "hidden_states", "pairs": [[1, 9]]}, "the teacher has no layer 9"),
        ({"kind": "hidden_states", "layers": "last", "count": 3}, "3 pairs does not fit 2"),
        ({"kind": "hidden_states", "pairs": [[0, 0]]}, "block 0"),
        ({"kind": "hidden_states", "pairs": [[0, 0]]}, "number blocks from 1, or set embeddings"),
        ({"kind": "attention_relations", "heads": 5}, "query width of 24 is not a multiple of 5"),
        ({"divergence": "jsd", "layers": [2]}, "the student has 2 blocks"),
    ],
)
def test_terms_that_do_not_fit_the_models_are_rejected_with_their_location(
    narrow: Setting, tmp_path: Path, term: dict[str, Any], message: str
) -> None:
    assert narrow.teacher is not None
    configs = [
        load_model(path, dtype=torch.float32).config for path in (narrow.student, narrow.teacher)
    ]
    with pytest.raises(SignalError, match=message) as caught:
        objective_for(objective(tmp_path, {}, term), *configs)
    assert caught.value.where == "objective.terms.1"
    assert caught.value.fix


@pytest.mark.parametrize("pairs", [[[1, 3]], [[0, 0], [1, 3]]])
def test_embeddings_are_compared_in_addition_to_given_pairs(
    narrow: Setting, tmp_path: Path, pairs: list[list[int]]
) -> None:
    assert narrow.teacher is not None
    configs = map(load_config, (narrow.student, narrow.teacher))
    term = {"kind": "hidden_states", "pairs": pairs, "embeddings": True}
    (hidden,) = objective_for(objective(tmp_path, {}, term), *configs).hidden
    assert hidden.loss.pairs == ((0, 0), (1, 3))


def test_terms_with_two_temperatures_on_one_layer_have_different_names(
    setting: Setting, tmp_path: Path
) -> None:
    terms: list[dict[str, Any]] = [{"layers": [1]}, {"layers": [1, 2], "temperature": 2.0}]
    run(setting, tmp_path / "both", objective=objective(tmp_path, *terms), max_steps=1)
    (both,) = read_metrics(tmp_path / "both" / "metrics.jsonl")
    for number, (term, names) in enumerate(zip(terms, (["T1"], ["T2", "T2"]), strict=True)):
        folder = tmp_path / str(number)
        run(setting, folder, objective=objective(tmp_path, term), max_steps=1)
        (alone,) = read_metrics(folder / "metrics.jsonl")
        for layer, name in enumerate(names, 1):
            found = both[f"forward_kl@{name}@layer{layer}"]
            assert found == pytest.approx(alone[f"forward_kl@layer{layer}"], rel=1e-6)


def test_two_terms_of_the_same_kind_are_rejected(narrow: Setting, tmp_path: Path) -> None:
    config = load_model(narrow.student, dtype=torch.float32).config
    with pytest.raises(SignalError, match="same kind"):
        objective_for(objective(tmp_path, HIDDEN, HIDDEN), config, config)
