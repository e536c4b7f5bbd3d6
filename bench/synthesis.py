"""The overhead of synthesis in addition to the teacher: `python -m bench.synthesis`.

The journal alone is measured in rows per second, and its memory over many rows. The request pool
with the journal sends 256 concurrent requests to a stub server in a separate process, which answers
each after 50 ms; the ideal rate is 256 / 0.05 s. The CPU time per request is also recorded, since
other load on the machine does not affect it. With --teacher, local generation is timed on prompts
of mixed lengths: Stillhouse's generator, `model.generate` one prompt at a time, and `generate` with
fixed batches in the given order. With --labeled, a CSV file whose columns `text` and `category` are
messages and their labels, a local model scores all labels of some texts with a shared prefix, and
with one pass per pair of text and label, which is timed on a few texts and extrapolated.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.common import Bar, write_results
from stillhouse.generation.budget import Budget
from stillhouse.generation.client import Client
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Answer, Request
from stillhouse.generation.request_pool import Pool

AT_ONCE = 256
LATENCY = 0.05
ANSWER = Answer("a short answer of some words, as a model would give it " * 4, "stop", None, 40, 50)
PARAMETERS = {"max_tokens": 64, "temperature": 0.7}


def requests(count: int, endpoint: str = "http://stub/v1") -> Iterator[Request]:
    for number in range(count):
        messages = ({"role": "user", "content": f"question {number}: " + "some words " * 20},)
        yield Request(endpoint, "teacher", messages, PARAMETERS)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


# --- the journal, and the pool with immediate answers ---------------------------------------------


def measure_journal(folder: Path, rows: int) -> dict[str, Any]:
    with Journal(folder / "journal.sqlite") as journal:
        started = time.perf_counter()
        for request in requests(rows):
            last = journal.record(request, ANSWER)
        last.result()
        took = time.perf_counter() - started
        assert journal.counts() == (rows, 0)
    return {"rows": rows, "seconds": took, "answers_a_second": rows / took}


def measure_memory(folder: Path, rows: int) -> dict[str, Any]:
    """Measure resident bytes after a tenth of the rows, as a warm-up, and after all rows."""
    seen: dict[int, int] = {}
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done % (rows // 10) == 0:
            seen[done] = resident()

    async def ask(request: Request) -> Answer:
        await asyncio.sleep(0)
        return ANSWER

    async def whole() -> None:
        with Journal(folder / "memory.sqlite") as journal:
            pool = Pool(ask, journal, Budget(), concurrency=AT_ONCE, advance=advance)
            await pool.answer_all(requests(rows))

    started = time.perf_counter()
    asyncio.run(whole())
    took = time.perf_counter() - started
    growth = seen[rows] - seen[rows // 10]
    return {"resident_bytes": seen, "growth_bytes": growth, "answers_a_second": rows / took}


# --- an endpoint -------------------------------------------------------------------------------


def measure_endpoint(folder: Path, url: str, count: int, name: str) -> dict[str, Any]:
    async def whole() -> tuple[float, float]:
        with Journal(folder / f"{name}.sqlite") as journal:
            async with Client(url, "teacher", connections=AT_ONCE) as client:
                # Open the connections, and let the limit rise to 256.
                await Pool(client.send, journal, Budget(), concurrency=AT_ONCE).answer_all(
                    requests(4 * AT_ONCE, "warm-up")
                )
                pool = Pool(client.send, journal, Budget(), concurrency=AT_ONCE)
                pool.limit.limit = AT_ONCE
                started, cpu = time.perf_counter(), time.process_time()
                tally = await pool.answer_all(requests(count, client.endpoint))
                assert tally.answered == count
                return time.perf_counter() - started, time.process_time() - cpu

    took, cpu = asyncio.run(whole())
    rate = count / took
    return {
        "requests": count,
        "seconds": took,
        "requests_a_second": rate,
        "share_of_ideal": rate / (AT_ONCE / LATENCY),
        "cpu_microseconds_a_request": cpu / count * 1e6,
    }


def measure_pool(folder: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.generation.stub", "--latency", str(LATENCY)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdin is not None
    url = server.stdout.readline().strip()
    try:
        return [measure_endpoint(folder, url, count, f"http{number}") for number in range(rounds)]
    finally:
        server.stdin.close()
        server.wait(10)


# --- a local model -----------------------------------------------------------------------------


def mixed_requests(count: int, text: Path) -> list[Request]:
    """Make prompts of 8 to 80 words, with answers of 8 to 128 tokens."""
    words = text.read_text(encoding="utf-8").split()
    chance = random.Random(0)
    made = []
    for _ in range(count):
        at, length = chance.randrange(len(words) - 100), chance.choice([8, 16, 32, 80])
        messages = ({"role": "user", "content": " ".join(words[at : at + length])},)
        most = chance.choice([8, 16, 32, 64, 128])
        made.append(Request("local", "m", messages, {"max_tokens": most, "temperature": 0.0}))
    return made


def generate(model: Any, tokenizer: Any, batch: list[Request]) -> int:
    """Generate one padded batch with transformers, until its longest answer is done; return the
    number of useful tokens."""
    from transformers import GenerationConfig

    chats = [[dict(message) for message in request.messages] for request in batch]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    limits = [int(request.parameters["max_tokens"]) for request in batch]
    config = GenerationConfig(
        max_new_tokens=max(limits),
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output_BL = model.generate(**inputs, generation_config=config)
    useful = 0
    for row, limit in zip(
        output_BL[:, inputs["input_ids"].shape[1] :].tolist(), limits, strict=True
    ):
        end = tokenizer.eos_token_id
        useful += min(limit, row.index(end) + 1 if end in row else len(row))
    return useful


def measure_local(teacher: Path, text: Path, count: int, batch: int) -> dict[str, Any]:
    from stillhouse.generation.local_generator import local_text
    from stillhouse.hardware import choose_precision, tune_allocator
    from stillhouse.teachers.load_model import load_model, load_tokenizer

    tune_allocator()
    precision = choose_precision("auto", "cpu")
    model, tokenizer = load_model(teacher, dtype=precision.dtype), load_tokenizer(teacher)
    tokenizer.padding_side = "left"
    asked = mixed_requests(count, text)

    def ours() -> int:
        outcomes = local_text(model, tokenizer, batch=batch).answers(asked)
        return sum(o.completion_tokens or 0 for _, o in outcomes if isinstance(o, Answer))

    def fixed() -> int:
        parts = [asked[at : at + batch] for at in range(0, count, batch)]
        return sum(generate(model, tokenizer, part) for part in parts)

    def one_by_one() -> int:
        return sum(generate(model, tokenizer, [request]) for request in asked[: count // 4])

    ways: dict[str, Callable[[], int]] = {"ours": ours, "fixed": fixed, "one_by_one": one_by_one}
    figures: dict[str, Any] = {"precision": precision.reason, "prompts": count, "batch": batch}
    with torch.inference_mode():
        generate(model, tokenizer, asked[:2])
    for name, work in ways.items():
        started = time.perf_counter()
        with torch.inference_mode():
            tokens = work()
        took = time.perf_counter() - started
        figures[name] = {"tokens": tokens, "seconds": took, "tokens_a_second": tokens / took}
    return figures


# --- labels ------------------------------------------------------------------------------------


@torch.no_grad()
def one_pass_a_pair(model: Any, prompts: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Score one pair per pass, with logits only for the label's tokens; [N, C]."""
    scores_NC = torch.zeros(len(prompts), len(labels))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            ids_1L = torch.tensor([[*prompt, *label]])
            logits_SV = model(ids_1L, use_cache=False, logits_to_keep=len(label) + 1).logits[0]
            log_p_SV = logits_SV[:-1].float().log_softmax(-1)
            chosen_S1 = torch.tensor(label)[:, None]
            scores_NC[row, column] = log_p_SV.gather(1, chosen_S1).sum()
    return scores_NC


def measure_labels(teacher: Path, labeled: Path, texts: int, by_pairs: int) -> dict[str, Any]:
    from stillhouse.classify.label_prompts import LabelPrompt, prompt_tokens
    from stillhouse.classify.label_scoring import label_scores
    from stillhouse.hardware import choose_precision, tune_allocator
    from stillhouse.teachers.load_model import load_model, load_tokenizer

    tune_allocator()
    with labeled.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    labels = {label: label.replace("_", " ") for label in sorted({r["category"] for r in rows})}
    chosen = [row["text"] for row in random.Random(0).sample(rows, texts)]
    prompt = LabelPrompt(
        labels,
        "You sort the questions of a bank's customers.",
        "Question: {text}\n\nWhat is this question about?",
        "{label}",
        (),
        True,
    )
    precision = choose_precision("auto", "cpu")
    model, tokenizer = load_model(teacher, dtype=precision.dtype), load_tokenizer(teacher)
    words = prompt_tokens(prompt, tokenizer, 256)
    prompts = words.of(chosen)
    label_scores(model, prompts[:2], words.labels)  # the first pass is slower
    started = time.perf_counter()
    scores = label_scores(model, prompts, words.labels)
    shared = time.perf_counter() - started
    started = time.perf_counter()
    reference = one_pass_a_pair(model, prompts[:by_pairs], words.labels)
    sample = time.perf_counter() - started
    same = scores[:by_pairs].argmax(1) == reference.argmax(1)
    return {
        "texts": texts,
        "labels": len(labels),
        "precision": precision.reason,
        "shared_seconds": shared,
        "pair_texts_timed": by_pairs,
        "pair_seconds_timed": sample,
        "pair_seconds_extrapolated": sample * texts / by_pairs,
        "largest_difference": float((scores[:by_pairs] - reference).abs().max()),
        "same_best_label": float(same.float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--teacher", type=Path, help="folder of a chat model, to time local generation"
    )
    parser.add_argument("--text", type=Path, help="file from which prompts are cut")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--labeled", type=Path, help="CSV with text and category, to time labeling")
    parser.add_argument("--label-texts", type=int, default=1000)
    parser.add_argument(
        "--pair-texts", type=int, default=10, help="number of these texts to score pair by pair"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal = measure_journal(folder, options.rows)
        memory = measure_memory(folder, options.rows)
        pool = measure_pool(folder, options.requests, options.rounds)
    best = max(one["share_of_ideal"] for one in pool)
    bars = [
        Bar("journal: answers/s", journal["answers_a_second"], ">=", 2000),
        Bar("memory: growth in bytes over the last 90% of rows", memory["growth_bytes"], "<=", 8e6),
        Bar("256 concurrent requests, 50 ms: share of the ideal rate", best, ">=", 0.9),
    ]
    figures: dict[str, Any] = {"journal": journal, "memory": memory, "pool": pool}
    if options.teacher and options.text:
        figures["local"] = local = measure_local(
            options.teacher, options.text, options.prompts, options.batch
        )
        rate = {way: local[way]["tokens_a_second"] for way in ("ours", "fixed", "one_by_one")}
        bars += [
            Bar("local: times one prompt at a time", rate["ours"] / rate["one_by_one"], ">=", 4),
            Bar("local: times generate in fixed batches", rate["ours"] / rate["fixed"], ">=", 1.5),
        ]
    if options.teacher and options.labeled:
        figures["labels"] = scored = measure_labels(
            options.teacher, options.labeled, options.label_texts, options.pair_texts
        )
        ratio = scored["pair_seconds_extrapolated"] / scored["shared_seconds"]
        bars.append(Bar("labels: times one pass per text and label", ratio, ">=", 5))
    write_results("synthesis", figures, bars)


if __name__ == "__main__":
    main()
