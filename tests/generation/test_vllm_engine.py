"""Requests to vLLM and its answers, with a stub module of two classes in its place.

Tests with the fixture `anywhere` run once in this Python and once in a separate environment.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import select
import signal
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse.check import check_recipe
from stillhouse.commands import synthesize_text
from stillhouse.config.load_recipe import parse_recipe
from stillhouse.errors import ModelError, RecipeError
from stillhouse.generation.journal import Journal
from stillhouse.generation.vllm_engine import ROLLOUTS, SIGNALS, lacks
from stillhouse.generation.vllm_process import VllmProcess
from stillhouse.synthesis.synthesize import Synthesis
from stillhouse.vllm_config import VllmEngine
from tests import tiny
from tests.forks import Fork, stillhouse

pytestmark = pytest.mark.run

STUB = '''
"""Answers with the number of the prompt's tokens; writes its arguments to a file."""
import fcntl, json, os, signal, time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent

def tell(name, facts):
    with (HERE / name).open("a") as file:
        file.write(json.dumps(facts) + "\\n")

@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    logprobs: int | None = None

class LLM:
    def __init__(self, model, **options):
        tell("opened.jsonl", {"model": model, **options})
        config = SimpleNamespace(max_model_len=options["max_model_len"] or 4096)
        self.llm_engine = SimpleNamespace(model_config=config)
        (HERE / "process").write_text(str(os.getpid()))

    def generate(self, prompts, *, sampling_params, use_tqdm):
        if (HERE / "fail").exists():
            raise RuntimeError("CUDA out of memory")
        tell("asked.jsonl", [asdict(one) for one in sampling_params])
        if (HERE / "kill").exists() and len((HERE / "asked.jsonl").read_text().splitlines()) == 2:
            os.kill(int((HERE / "kill").read_text() or os.getpid()), signal.SIGKILL)
        if (HERE / "hang").exists():
            lock = (HERE / "alive").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            (HERE / "hangs").touch()
            time.sleep(3600)
        print("vLLM prints to standard output")
        pairs = zip(prompts, sampling_params, strict=True)
        return [SimpleNamespace(outputs=[answer(**one, params=two)]) for one, two in pairs]

def answer(prompt_token_ids, params):
    size = len(prompt_token_ids)
    told = None
    if params.logprobs is not None:
        last = SimpleNamespace(logprob=-((params.seed or 0) % 5) / 10)
        told = [{7: SimpleNamespace(logprob=-1.0)}, {8: last}]
    reason = "length" if params.max_tokens < 2 else "stop"
    seed = "" if params.seed is None else f" by {params.seed}"
    text = f"{size} tokens{seed}"
    return SimpleNamespace(text=text, token_ids=[7, 8], finish_reason=reason, logprobs=told)
'''


def stub_in(folder: Path) -> Path:
    package = folder / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    return package


def use_stub(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this Python import the package, on a machine that reports two GPUs."""
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    importlib.invalidate_caches()


@pytest.mark.parametrize(("visible", "gpu", "expected"), [("3", 0, 3), ("4,5", 1, 5), (None, 1, 1)])
def test_vllm_gets_one_of_the_gpus_that_this_process_may_use(
    visible: str | None, gpu: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nread line; echo "{\\"window\\": $CUDA_VISIBLE_DEVICES}"; read line\n'
    )
    python.chmod(0o755)
    engine = VllmProcess(str(python), {}, gpu=gpu)
    engine.close()
    assert engine.window == expected


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stub package `vllm`, which this Python can import."""
    package = stub_in(tmp_path)
    use_stub(package, monkeypatch)
    return package


GPUS = """
from types import SimpleNamespace
cuda = SimpleNamespace(device_count=lambda: {gpus})
"""


def environment(folder: Path, *, gpus: int = 2, vllm: bool = True) -> Path:
    """Create an environment in folder/env that contains only stubs of vLLM and torch."""
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "torch.py").write_text(GPUS.format(gpus=gpus))
    if vllm:
        (site / "vllm").mkdir()
        (site / "vllm" / "__init__.py").write_text(STUB)
    return site / "vllm"


@pytest.fixture(params=["this Python", "another Python"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Like `stub`, or in a separate environment, which `write` then puts into the recipe."""
    if request.param == "this Python":
        stub: Path = request.getfixturevalue("stub")
        return stub
    return environment(tmp_path)


def write(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """A recipe with twelve prompts of one word, each longer than the last."""
    (folder / "prompts.txt").write_text("".join(f"{'a' * (n + 1)}\n" for n in range(12)))
    python = {"python": "env/bin/python"} if (folder / "env").exists() else {}
    section = {
        "teacher": {"vllm": {"batch": 5, **python, **changes.pop("vllm", {})}},
        "prompts": {"path": "prompts.txt", **changes.pop("prompts", {})},
        "sampling": {"temperature": 0.0, "max_tokens": 20, **changes.pop("sampling", {})},
        **changes,
    }
    raw = tiny.recipe(folder, name=name, folder=str(folder / "runs" / name), synthesize=section)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def recorded(stub: Path, name: str) -> list[Any]:
    file = stub / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def answers(result: Synthesis | None) -> list[str]:
    rows = [json.loads(line)["messages"] for line in result.out.read_text().splitlines()]
    return [row[-1]["content"] for row in rows]


def prompt_tokens(text: str) -> int:
    chat = [{"role": "user", "content": text}]
    encoded = tiny.tokenizer().apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True
    )
    return len(encoded["input_ids"])


def test_prompts_are_formatted_batched_and_recorded_in_the_journal(
    tmp_path: Path, anywhere: Path
) -> None:
    result = synthesize_text(write(tmp_path))
    expected = [f"{prompt_tokens('a' * (n + 1))} tokens" for n in range(12)]
    assert answers(result) == expected
    assert [len(batch) for batch in recorded(anywhere, "asked")] == [5, 5, 2]
    assert all(one["seed"] is None for batch in recorded(anywhere, "asked") for one in batch)
    assert result.tokens == sum(prompt_tokens("a" * (n + 1)) + 2 for n in range(12))
    with Journal(result.journal) as journal:
        assert journal.counts() == (12, 0)
    again = synthesize_text(write(tmp_path, name="other"))
    assert (again.new, again.answered) == (0, 12)
    assert len(recorded(anywhere, "opened")) == 1, "answers in the journal need no vLLM"


def test_the_model_is_opened_with_the_recipes_options(tmp_path: Path, anywhere: Path) -> None:
    own = {"tensor_parallel": 2, "dtype": "bfloat16", "context": 64, "gpu_memory": 0.5}
    synthesize_text(write(tmp_path, vllm={**own, "options": {"quantization": "fp8"}}))
    (opened,) = recorded(anywhere, "opened")
    assert Path(opened.pop("model")) == tmp_path / "teacher"
    assert opened == {
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "seed": 0,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
        "distributed_executor_backend": None,
        "max_model_len": 64,
        "gpu_memory_utilization": 0.5,
        "quantization": "fp8",
    }


def test_vllms_process_has_ended_when_the_text_is_written(tmp_path: Path, anywhere: Path) -> None:
    synthesize_text(write(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(int((anywhere / "process").read_text()), 0)


def test_samples_have_different_seeds_which_another_run_repeats(
    tmp_path: Path, anywhere: Path
) -> None:
    changes: dict[str, Any] = {"prompts": {"samples": 2}, "sampling": {"temperature": 0.7}}
    first = answers(synthesize_text(write(tmp_path, **changes)))
    assert len(set(first)) == 24
    (tmp_path / "runs" / "answers.sqlite").unlink()
    assert answers(synthesize_text(write(tmp_path, name="again", **changes))) == first


def test_the_most_likely_answer_is_kept(tmp_path: Path, anywhere: Path) -> None:
    """In the stub, the larger an answer's seed is modulo 5, the less likely the answer is."""
    changes: dict[str, Any] = {"prompts": {"samples": 2}, "sampling": {"temperature": 0.7}}
    best_of = {"best_of": {"kind": "likelihood"}}
    result = synthesize_text(write(tmp_path, filters=best_of, **changes))
    assert (result.kept, result.dropped["best_of"]) == (12, 12)
    lost = [json.loads(line)["messages"] for line in result.dropped_rows.read_text().splitlines()]
    for kept, other in zip(answers(result), lost, strict=True):
        assert _seed(kept) % 5 <= _seed(other[-1]["content"]) % 5


def _seed(answer: str) -> int:
    return int(answer.split()[-1])


def test_a_prompt_that_leaves_no_room_for_an_answer_fails_alone(
    tmp_path: Path, anywhere: Path
) -> None:
    longest = prompt_tokens("a" * 12)
    result = synthesize_text(write(tmp_path, vllm={"context": longest}, filters={}))
    assert (result.answered, result.failed) == (11, 1)
    assert result.dropped["truncated"] == 1, "the answer that had room for one token"


def _synthesize_until_killed(path: Path, stub: Path) -> None:
    sys.path.insert(0, str(stub.parent))
    os.environ["PYTHONPATH"] = str(stub.parent)
    (stub / "kill").write_text(str(os.getpid()))
    synthesize_text(path)


@pytest.mark.run
def test_a_kill_loses_only_the_batch_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stub = write(tmp_path), stub_in(tmp_path)
    assert Fork(_synthesize_until_killed, path, stub).wait() == -signal.SIGKILL
    (stub / "kill").unlink()
    use_stub(stub, monkeypatch)
    with Journal(tmp_path / "runs" / "answers.sqlite") as journal:
        assert journal.counts() == (5, 0)
    assert synthesize_text(path).new == 7


def test_vllm_errors_are_reported(tmp_path: Path, anywhere: Path) -> None:
    (anywhere / "fail").touch()
    with pytest.raises(ModelError, match="CUDA out of memory"):
        synthesize_text(write(tmp_path))


@pytest.mark.parametrize(
    ("vllm", "gpus", "level", "said"),
    [
        ({}, 0, "warning", "this machine has no GPU"),
        ({"tensor_parallel": 4}, 2, "error", "4 GPUs are requested, but this machine has 2"),
        ({"tensor_parallel": 4, "executor": "ray"}, 2, "error", "Ray is not installed"),
        ({"tensor_parallel": 2}, 2, None, None),
    ],
    ids=["no GPU", "too few", "no Ray", "all there"],
)
@pytest.mark.usefixtures("stub")
def test_check_reports_what_this_machine_lacks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vllm: dict[str, Any],
    gpus: int,
    level: str | None,
    said: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = [one for one in check_recipe(write(tmp_path, vllm=vllm)) if one.topic == "vLLM"]
    assert [one.level for one in found] == ([level] if level else [])
    assert all(said is not None and said in one.text for one in found)


def test_without_vllm_check_and_run_say_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path)
    (missing, _) = (one for one in check_recipe(path) if one.topic == "vLLM")
    assert (missing.level, missing.text) == ("error", "vLLM is not installed")
    assert "vllm serve" in (missing.fix or "")
    with pytest.raises(RecipeError, match="vLLM is not installed"):
        synthesize_text(path)


def test_a_ray_cluster_is_selected_by_name(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stub.parent / "ray").mkdir()
    (stub.parent / "ray" / "__init__.py").touch()
    shape = {"executor": "ray", "tensor_parallel": 8, "pipeline_parallel": 2}
    synthesize_text(write(tmp_path, vllm=shape))
    (opened,) = recorded(stub, "opened")
    assert opened["distributed_executor_backend"] == "ray"
    assert (opened["tensor_parallel_size"], opened["pipeline_parallel_size"]) == (8, 2)


def test_an_option_that_has_a_separate_key_is_rejected(tmp_path: Path) -> None:
    section = {"teacher": {"vllm": {"options": {"seed": 3}}}, "prompts": {"path": "p.txt"}}
    with pytest.raises(RecipeError, match="seed cannot be set in options"):
        parse_recipe(tiny.recipe(tmp_path, synthesize=section))


# --- a separate environment ----------------------------------------------------------------------


def test_check_reports_what_the_other_environment_lacks(tmp_path: Path) -> None:
    environment(tmp_path, gpus=0, vllm=False)
    path = write(tmp_path, vllm={"executor": "ray"})
    found = [one for one in check_recipe(path) if one.topic == "vLLM"]
    python = tmp_path / "env" / "bin" / "python"
    assert [(one.level, one.text) for one in found] == [
        ("error", f"vLLM is not installed for {python}"),
        ("error", f"Ray is not installed for {python}"),
        ("warning", "this machine has no GPU, which vLLM's usual build needs"),
    ]
    assert f"{python} -m pip install vllm" in (found[0].fix or "")
    with pytest.raises(RecipeError, match="vLLM is not installed for"):
        synthesize_text(path)


def test_check_reports_nothing_missing_in_the_other_environment(tmp_path: Path) -> None:
    environment(tmp_path, gpus=2)
    path = write(tmp_path, vllm={"tensor_parallel": 2})
    assert [one for one in check_recipe(path) if one.topic == "vLLM"] == []


@pytest.mark.parametrize(
    ("python", "said"),
    [("nowhere/python", "cannot be run: No such file"), ("/bin/false", "is not Python")],
)
def test_a_path_that_is_not_a_python_is_reported(tmp_path: Path, python: str, said: str) -> None:
    path = write(tmp_path, vllm={"python": python})
    (found,) = (one for one in check_recipe(path) if one.topic == "vLLM")
    assert said in found.text
    assert "set synthesize.teacher.vllm.python: vllm-env/bin/python" in (found.fix or "")
    with pytest.raises(RecipeError, match=said):
        synthesize_text(path)


@pytest.mark.parametrize("key", [SIGNALS, ROLLOUTS])
def test_the_fix_names_the_sections_own_key(key: str, tmp_path: Path) -> None:
    ((_, _, fix),) = lacks(VllmEngine(python="nowhere/python"), tmp_path, key=key)
    assert f"set {key}.python: vllm-env/bin/python" in fix


def test_an_error_while_the_model_is_opened_is_reported(tmp_path: Path) -> None:
    package = environment(tmp_path)
    (package / "__init__.py").write_text("raise OSError('libcudart.so is not found')")
    with pytest.raises(ModelError, match=r"cannot load .*\(OSError: libcudart.so is not found\)"):
        synthesize_text(write(tmp_path))


@pytest.mark.run
def test_a_vllm_process_that_dies_loses_only_the_batch_in_flight(tmp_path: Path) -> None:
    package = environment(tmp_path)
    (package / "kill").touch()
    path = write(tmp_path)
    with pytest.raises(ModelError, match="its process ended: SIGKILL"):
        synthesize_text(path)
    (package / "kill").unlink()
    with Journal(tmp_path / "runs" / "answers.sqlite") as journal:
        assert journal.counts() == (5, 0)
    assert synthesize_text(path).new == 7


def has_ended(package: Path) -> bool:
    """Wait until the stub's process ends and so releases its lock."""
    with (package / "alive").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    return True


@pytest.mark.run
def test_vllm_ends_when_its_parent_process_is_killed(tmp_path: Path) -> None:
    package = environment(tmp_path)
    (package / "hang").touch()
    path = write(tmp_path)
    parent = stillhouse("synthesize", str(path))
    while not (package / "hangs").exists():
        assert parent.poll() is None, parent.communicate()[1]
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert has_ended(package)


@pytest.mark.run
def test_vllm_ends_when_generation_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = environment(tmp_path)
    (package / "hang").touch()

    def interrupted(*_: object) -> None:
        while not (package / "hangs").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    engine = VllmProcess(str(tmp_path / "env/bin/python"), {"model": "m", "max_model_len": None})
    monkeypatch.setattr(select, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([{"prompt": [1], "sampling": {}}])
    engine.close()
    assert has_ended(package)
