"""Time and memory of the data stage for text larger than memory.

    python -m bench.big_text --tokenizer DIR

Documents of about 500 tokens are made of random sentences from CPython's language reference (or
from --text FILE), with invented words and numbers in between, and written to a JSONL file. The data
stage packs them into windows in a separate process, whose peak resident memory, time, and CPU time
are measured. Tokens per second of CPU time do not depend on other work on the machine. A second,
smaller text is packed twice: without interruption, and with the process killed halfway and started
again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.common import Bar, write_results
from stillhouse.data.build_data import TOKENIZED
from stillhouse.data.sources import python_reference

SEED = 0
DOCUMENT_CHARACTERS = 2000
INVENTED = 0.02
"""The share of sentences that are followed by a word and a number found in no other text."""
CONTEXT = 1024
STAGE = "import sys; from stillhouse.commands import prepare_data; prepare_data(sys.argv[1])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer's folder")
    parser.add_argument("--text", type=Path, help="file from which sentences are drawn")
    parser.add_argument("--tokens", type=float, default=250e6)
    parser.add_argument("--killed-tokens", type=float, default=20e6)
    parser.add_argument("--folder", type=Path, help="empty folder for temporary files")
    options = parser.parse_args()
    text = options.text.read_text("utf-8") if options.text else None
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        save_teacher(folder / "teacher", options.tokenizer)
        write_text(folder / "small.jsonl", options.killed_tokens, folder / "teacher", text)
        figures = {"small": run_stage(folder, "small")}
        figures["killed"] = run_killed(folder, figures["small"])
        write_text(folder / "large.jsonl", options.tokens, folder / "teacher", text)
        figures["large"] = large = run_stage(folder, "large")
    write_results(
        "big_text",
        figures,
        [
            Bar("peak memory, GB", large["peak_memory_bytes"] / 1e9, "<=", 2.0),
            Bar("tokens/s", large["tokens_a_second"], ">=", 400_000),
            Bar("tokens per second of CPU time", large["tokens_a_cpu_second"], ">=", 400_000),
            Bar("killed: the same windows", float(figures["killed"]["same_windows"]), ">=", 1),
        ],
        seeds=[SEED],
    )


# --- input of the stage --------------------------------------------------------------------------


def save_teacher(folder: Path, tokenizer: Path) -> None:
    """Save the tokenizer with a minimal model, which a recipe requires."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_text(path: Path, tokens: float, tokenizer: Path, text: str | None) -> None:
    """Write documents of about `tokens` tokens, estimated from the first 1,000 documents."""
    if text is None:
        text = "\n".join(document.text for document in python_reference())
    sentences = re.split(r"(?<=[.:])\s+", text)
    drawn = random.Random(f"{SEED} {tokens}")
    first = [document_text(sentences, drawn) for _ in range(1000)]
    encoded = AutoTokenizer.from_pretrained(tokenizer)(first)["input_ids"]
    count = round(tokens * len(first) / (sum(map(len, encoded)) + len(first)))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"text": document_text(sentences, drawn)}) + "\n")


def document_text(sentences: list[str], drawn: random.Random) -> str:
    parts: list[str] = []
    size = 0
    while size < DOCUMENT_CHARACTERS:
        part = drawn.choice(sentences)
        if drawn.random() < INVENTED:
            letters = drawn.choices("etaoinshrdlu", k=drawn.randint(4, 9))
            part += f" {''.join(letters)} {drawn.randrange(10**6)}"
        parts.append(part)
        size += len(part)
    return " ".join(parts)


def write_recipe(folder: Path, name: str, run: str) -> Path:
    raw = {
        "name": run,
        "folder": str(folder / run),
        "teacher": {"model": "./teacher"},
        "student": {"start": "pruned", "layers": 1},
        "data": {"sources": [{"kind": "jsonl", "path": f"{name}.jsonl"}], "context": CONTEXT},
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


# --- the stage, in a separate process ------------------------------------------------------------


def start(recipe: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    return subprocess.Popen([sys.executable, "-c", STAGE, str(recipe)], env=environment)


def finish(process: subprocess.Popen[bytes]) -> tuple[float, int]:
    """Wait for the process; return its CPU seconds and peak resident bytes."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, -signal.SIGKILL), process.returncode
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def run_stage(folder: Path, name: str) -> dict[str, Any]:
    """Run the stage without interruption."""
    recipe = write_recipe(folder, name, name)
    started = time.perf_counter()
    cpu, peak = finish(start(recipe))
    seconds = time.perf_counter() - started
    (manifest,) = (folder / name / "stages").glob("data-*/manifest.json")
    done = json.loads(manifest.read_text())
    tokens = sum(done["summary"][side]["tokens"] for side in ("train", "heldout"))
    return {
        "tokens": tokens,
        "documents": sum(done["summary"][side]["documents"] for side in ("train", "heldout")),
        "text_bytes": (folder / f"{name}.jsonl").stat().st_size,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens_a_second": tokens / seconds,
        "tokens_a_cpu_second": tokens / cpu,
        "peak_memory_bytes": peak,
        "digest": done["digest"],
    }


def run_killed(folder: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Run the small text of `whole` again, kill it when half is tokenized, and restart it."""
    recipe = write_recipe(folder, "small", "killed")
    process = start(recipe)
    stages = folder / "killed" / "stages"
    half = 4 * whole["tokens"] // 2
    while sum(file.stat().st_size for file in stages.glob(f".data-*/{TOKENIZED}/*")) < half:
        time.sleep(0.01)
    process.kill()
    before, _ = finish(process)
    (log,) = stages.glob(f".data-*/{TOKENIZED}/train")
    kept = complete_tokens(log)
    after, peak = finish(start(recipe))
    (manifest,) = stages.glob("data-*/manifest.json")
    return {
        "cpu_seconds_without_a_kill": whole["cpu_seconds"],
        "cpu_seconds_before_and_after": [before, after],
        "tokens": whole["tokens"],
        "tokens_of_complete_records": kept,
        "peak_memory_bytes": peak,
        "same_windows": json.loads(manifest.read_text())["digest"] == whole["digest"],
    }


def complete_tokens(log: Path) -> int:
    """Count the tokens in the log of a killed process, excluding an incomplete last record."""
    found = 0
    with log.open("rb") as file:
        file.readline()
        while line := file.readline():
            try:
                tokens = sum(n for _, lengths, _ in json.loads(line)["rows"] for n in lengths)
            except ValueError:
                break
            file.seek(4 * tokens + 16, os.SEEK_CUR)
            if file.tell() <= log.stat().st_size:
                found += tokens
    return found


if __name__ == "__main__":
    main()
