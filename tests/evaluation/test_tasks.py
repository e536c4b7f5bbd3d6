"""lm-eval on local task files; without lm-eval, a clear error."""

from __future__ import annotations

import builtins
import errno
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from stillhouse.errors import RecipeError, StillhouseError
from stillhouse.evaluation.evaluate_config import LmEvalRecipe
from stillhouse.evaluation.lm_eval import _scores, require_tasks, run_tasks

from .toys import save_toy, toy_model

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_the_error_without_lm_eval_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(StillhouseError, match=r"pip install stillhouse\[eval\]"):
        run_tasks(
            tmp_path, LmEvalRecipe(tasks=["arc_easy"]), tokenizer=tmp_path, dtype=torch.float32
        )


@pytest.fixture
def fake_lm_eval(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for lm-eval with one task, `toy`."""
    lm_eval, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    vars(tasks)["TaskManager"] = lambda **_: SimpleNamespace(all_tasks=["toy"])
    vars(lm_eval)["tasks"] = tasks
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return lm_eval


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ModuleNotFoundError("No module named 'langdetect'"), "install the package"),
        (RuntimeError("Dataset scripts are no longer supported"), "data files"),
        (yaml.YAMLError("expected a mapping"), "the task's file"),
    ],
)
def test_a_task_that_fails_is_an_error_not_a_traceback(
    fake_lm_eval: ModuleType, tmp_path: Path, error: Exception, fix: str
) -> None:
    vars(fake_lm_eval)["simple_evaluate"] = Mock(side_effect=error)
    with pytest.raises(RecipeError, match=f"could not run these tasks.*{error}") as caught:
        run_tasks(tmp_path, LmEvalRecipe(tasks=["toy"]), tokenizer=tmp_path, dtype=torch.float32)
    assert fix in str(caught.value.fix)
    for other in (MemoryError(), OSError(errno.ENOSPC, "No space left on device")):
        vars(fake_lm_eval)["simple_evaluate"] = Mock(side_effect=other)
        with pytest.raises(type(other)) as passed:
            run_tasks(
                tmp_path, LmEvalRecipe(tasks=["toy"]), tokenizer=tmp_path, dtype=torch.float32
            )
        assert passed.value is other


def test_a_damaged_task_file_is_an_error_with_its_folder(
    fake_lm_eval: ModuleType, tmp_path: Path
) -> None:
    damaged = Mock(side_effect=yaml.YAMLError("expected a mapping"))
    vars(sys.modules["lm_eval.tasks"])["TaskManager"] = damaged
    with pytest.raises(RecipeError, match="could not read its tasks") as caught:
        require_tasks(LmEvalRecipe(tasks=["toy"], include_path=str(tmp_path)))
    assert caught.value.where == str(tmp_path)


def test_scores_are_named_by_task_metric_and_filter() -> None:
    results = {
        "toy": {
            "alias": "toy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict": 1,
            "acc_norm_stderr,none": "N/A",
            "sample_len": 4,
        }
    }
    assert _scores(results) == {"toy/acc": 0.5, "toy/exact_match/strict": 1.0}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    questions = ["the cat", "a dog", "the mat", "the dog saw"]
    rows = [
        {"question": question, "choices": ["sat", "run", "mat"], "answer": index % 3}
        for index, question in enumerate(questions)
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "toy_choice.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return save_toy(tmp_path / "model", toy_model())


def accuracy_by_hand(data: Path) -> float:
    """The accuracy by each choice's log-likelihood after the question, without lm-eval."""
    from .toys import toy_tokenizer

    model, tokenizer = toy_model(), toy_tokenizer()
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    right = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["question"])["input_ids"]])
        with torch.no_grad():
            last = model(ids).logits[0, -1]
        choices = [int(tokenizer(choice)["input_ids"][0]) for choice in row["choices"]]
        right += int(last[choices].argmax()) == row["answer"]
    return right / len(rows)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_local_task_is_scored(task_folder: Path, toy: Path, by_name: bool) -> None:
    pytest.importorskip("lm_eval")
    section = (
        LmEvalRecipe(tasks=["toy_choice"], include_path=str(task_folder))
        if by_name
        else LmEvalRecipe(tasks=[str(task_folder / "toy_choice.yaml")])
    )
    scores = run_tasks(toy, section, tokenizer=toy, dtype=torch.float32)
    assert scores == {"toy_choice/acc": accuracy_by_hand(task_folder / "data.jsonl")}


def test_the_error_for_an_unknown_task_names_it(task_folder: Path, toy: Path) -> None:
    pytest.importorskip("lm_eval")
    section = LmEvalRecipe(tasks=["toy_choise"], include_path=str(task_folder))
    with pytest.raises(RecipeError, match="has no task toy_choise"):
        run_tasks(toy, section, tokenizer=toy, dtype=torch.float32)


def test_missing_task_data_is_an_error_not_a_traceback(task_folder: Path, toy: Path) -> None:
    pytest.importorskip("lm_eval")
    (task_folder / "data.jsonl").unlink()
    section = LmEvalRecipe(tasks=["toy_choice"], include_path=str(task_folder))
    with pytest.raises(RecipeError, match="data files"):
        run_tasks(toy, section, tokenizer=toy, dtype=torch.float32)


def test_an_include_path_that_is_not_a_folder_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    section = LmEvalRecipe(tasks=["x"], include_path=str(tmp_path / "absent"))
    with pytest.raises(RecipeError, match="not a folder"):
        run_tasks(tmp_path, section, tokenizer=tmp_path, dtype=torch.float32)
