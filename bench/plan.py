"""A run's planned memory compared with its measured peak, for four small runs on a CPU.

    make bench NAME=plan

Each stage runs in a separate process, which finds the earlier stages finished. Linux records its
peak resident memory (VmHWM). Memory that the process has before the stage, which is that of the
libraries, is excluded from both figures. A run's peak is that of its largest stage.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bench.common import Bar, earlier, write_results
from stillhouse.config.load_recipe import load_language_model_recipe
from stillhouse.hardware import peak_memory_bytes, reset_peak_memory, tune_allocator
from stillhouse.language_model.language_model import LANGUAGE_MODEL
from stillhouse.language_model.run_models import run_models
from stillhouse.language_model.run_plan import plan_stages
from stillhouse.pipeline.engine import run_folder, run_steps
from stillhouse.pipeline.stage_plan import doing
from stillhouse.planning.machine import this_machine
from stillhouse.planning.step_memory import Memory
from stillhouse.runfolder import Stage, StagePlan

TOLERANCE = 0.1
VOCABULARY = 16384
TOKENS = 16_000
LIBRARIES = ("context", "libraries")
"""Parts of a plan that are in memory before a process's first stage."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=sorted(RECIPES))
    parser.add_argument(
        "--replan",
        action="store_true",
        help="plan again, and compare with the peaks of the last results",
    )
    parser.add_argument("--measure", nargs=2, help="measure one stage of a recipe in this process")
    options = parser.parse_args()
    if options.measure is not None:
        recipe, stage = options.measure
        print(json.dumps(measured(Path(recipe), stage)))
        return
    last = earlier("plan").get("figures", {}) if options.replan else {}
    figures = {name: compared(name, last.get(name)) for name in options.only}
    bars = [
        Bar(f"{name}: planned / measured, away from 1", abs(found["ratio"] - 1), "<=", TOLERANCE)
        for name, found in figures.items()
    ]
    bars += [
        Bar(
            f"{name}: {stage}, away from 1",
            abs(found["planned"] / found["measured"] - 1),
            "<=",
            TOLERANCE,
        )
        for name, run in figures.items()
        for stage, found in run["stages"].items()
    ]
    write_results("plan", figures, bars)


def compared(name: str, last: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compare planned and measured memory for a run's stages. last: figures whose peaks are used
    instead of measuring again."""
    stages = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = written(name, Path(folder))
        for stage, memory in planned_stages(recipe).items():
            if last is not None:
                peak = last["stages"][stage]["measured"]
            else:
                command = [sys.executable, "-m", "bench.plan", "--measure", str(recipe), stage]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                peak = json.loads(done.stdout.splitlines()[-1])
            stages[stage] = {
                "planned": without_libraries(memory),
                "measured": peak,
                "phase": memory.phase,
                "parts": dict(memory.parts),
            }
            print(f"{name}: {stage}: {stages[stage]}", flush=True)
    planned, peak = (
        max(found[key] for found in stages.values()) for key in ("planned", "measured")
    )
    return {"planned": planned, "measured": peak, "ratio": planned / peak, "stages": stages}


def planned_stages(path: Path) -> dict[str, Memory]:
    """Return the planned memory of each stage on this machine, where a plan exists."""
    recipe = load_language_model_recipe(path)
    job = LANGUAGE_MODEL.find(recipe, path.parent)
    machine = this_machine(recipe.train.precision, timed=False)
    stages = plan_stages(run_models(job), machine, TOKENS)
    return {stage.name: stage.memory for stage in stages if stage.memory.parts}


def measured(path: Path, name: str) -> int:
    """Peak memory of a stage in bytes, in addition to the memory before it."""
    tune_allocator()
    recipe = load_language_model_recipe(path)
    job = LANGUAGE_MODEL.find(recipe, path.parent)
    folder = run_folder(recipe)
    run_stage = doing(folder)
    peaks: dict[str, int] = {}

    def do(plan: StagePlan) -> Stage:
        before = psutil.Process().memory_info().rss
        reset_peak_memory()
        stage = run_stage(plan)
        peaks[plan.name] = peak_memory_bytes() - before
        return stage

    names = [step.name for step in LANGUAGE_MODEL.steps]
    with folder.locked():
        run_steps(LANGUAGE_MODEL, job, do, only=names[: names.index(name) + 1])
    return peaks[name]


def without_libraries(memory: Memory) -> float:
    return sum(size for part, size in memory.parts.items() if part not in LIBRARIES)


# --- the runs --------------------------------------------------------------------------------


def sizes(hidden: int, ffn: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


EXPERTS = {"moe_intermediate_size": 512, "num_experts": 8, "num_experts_per_tok": 2}
RECIPES: dict[str, tuple[PreTrainedConfig, PreTrainedConfig | None, dict[str, Any]]] = {
    "pruned, float32, short windows": (
        LlamaConfig(**sizes(768, 2048, 16, 12, 4), tie_word_embeddings=True),
        None,
        {
            "student": {"start": "pruned", "ffn_size": 1024, "calibration_tokens": 2048},
            "data": {"context": 256},
            "train": {"batch_size": 8, "precision": "float32"},
        },
    ),
    "accumulation, bfloat16, checkpointing": (
        Qwen3Config(**sizes(1024, 3072, 12, 16, 8), head_dim=64, tie_word_embeddings=True),
        Qwen3Config(**sizes(768, 2304, 12, 12, 4), head_dim=64, tie_word_embeddings=True),
        {
            "data": {"context": 1024},
            "train": {
                "batch_size": 4,
                "micro_batch_size": 2,
                "precision": "bfloat16",
                "gradient_checkpointing": True,
            },
        },
    ),
    "stored signals, bfloat16": (
        LlamaConfig(**sizes(768, 2048, 12, 12, 12)),
        LlamaConfig(**sizes(640, 1792, 12, 10, 10)),
        {
            "data": {"context": 1024},
            "train": {"batch_size": 4, "precision": "bfloat16"},
            "signals": {"encoding": {"kind": "top_k", "k": 16}},
        },
    ),
    "mixture of experts to dense": (
        Qwen3MoeConfig(**sizes(512, 1024, 12, 8, 4), head_dim=64, **EXPERTS),
        LlamaConfig(**sizes(512, 1536, 16, 8, 4)),
        {
            "data": {"context": 768},
            "train": {"batch_size": 6, "micro_batch_size": 3, "precision": "bfloat16"},
        },
    ),
}


def written(name: str, folder: Path) -> Path:
    """Write the recipe of a run to a folder, with its models and text."""
    teacher, student, sections = RECIPES[name]
    raw: dict[str, Any] = {
        "name": "planned",
        "folder": str(folder / "run"),
        "teacher": {"model": str(save(teacher, folder / "teacher"))},
        "evaluate": {"speed": False},
        **sections,
    }
    if student is not None:
        raw["student"] = {"start": "pretrained", "model": str(save(student, folder / "student"))}
    chance = random.Random(0)
    lines = (
        " ".join(f"w{chance.randrange(VOCABULARY - 1)}" for _ in range(100))
        for _ in range(TOKENS // 100 + 100)
    )
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    source = {"kind": "text", "path": str(folder / "text.txt"), "documents": "line"}
    raw["data"] |= {"sources": [source], "heldout_tokens": 2048, "train_tokens": TOKENS}
    raw["train"] |= {"max_steps": 2, "checkpoint_every": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


def save(config: PreTrainedConfig, folder: Path) -> Path:
    """Save a random model, and a tokenizer with the same vocabulary size."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<end>": 0} | {f"w{number}": number + 1 for number in range(VOCABULARY - 1)}
    core = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<end>"
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
