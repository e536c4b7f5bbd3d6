"""Trials with rows in the forms of public data sets and of other trainers' documentation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.input_trials import files
from bench.input_trials.chat_formats import Turn
from bench.input_trials.reading import BY_NAME, Quirk, judged, read, refused
from bench.input_trials.rows import Learned, Row, Seen, Writer, chat_row, tools_of
from bench.input_trials.trial import Refusal, Trial

ENDS = ("⟦<|im_end|>⟧",)


def _rows(
    chance: random.Random, folder: Path, name: str, form: Any, refusal: Refusal = "never"
) -> Trial:
    """Make a trial of three rows. form: returns a row, its answer, and the parts before it."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    rows = []
    for _ in range(3):
        value, answer, parts = form(writer)
        rows.append(Row(value, (Learned(answer, None, tuple(parts), ENDS),)))
    path = files.write(folder, "r.jsonl", files.jsonl([row.value for row in rows]))
    return judged(name, path, rows, format, refusal)


def dolly(chance: random.Random, folder: Path) -> Trial:
    def form(writer: Writer) -> Any:
        ask, context, answer = (writer.text() for _ in range(3))
        value = {"instruction": ask, "context": context, "response": answer, "category": "qa"}
        return value, answer, [ask, context]

    return _either_order(chance, folder, "Dolly", form)


def squad(chance: random.Random, folder: Path) -> Trial:
    def form(writer: Writer) -> Any:
        ask, context, answer = (writer.text() for _ in range(3))
        value = {"context": context, "question": ask, "answer": answer, "id": "7"}
        return value, answer, [ask, context]

    return _either_order(chance, folder, "question, context, answer", form)


def _either_order(chance: random.Random, folder: Path, name: str, form: Any) -> Trial:
    """A trial that accepts the question and its context in either order."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    made = [form(writer) for _ in range(3)]
    path = files.write(folder, "r.jsonl", files.jsonl([value for value, _, _ in made]))

    def wrong(seen: list[Seen]) -> str | None:
        pairs = [pair for each in seen for pair in each.pairs]
        for _, answer, parts in made:
            found = [p for p in pairs if p[1] == f"{answer}{ENDS[0]}"]
            if len(found) != 1 or not all(part in found[0][0] for part in parts):
                return f"{parts} and {answer} are not in {pairs}"
        return None if len(pairs) == len(made) else f"also learned: {pairs}"

    return Trial(name, lambda: read(path, format), wrong, "may")


def open_orca(chance: random.Random, folder: Path) -> Trial:
    def form(writer: Writer) -> Any:
        system, ask, answer = (writer.text() for _ in range(3))
        value = {"id": "x", "system_prompt": system, "question": ask, "response": answer}
        return value, answer, [system, ask]

    return _rows(chance, folder, "OpenOrca", form, "may")


def ultrachat(chance: random.Random, folder: Path) -> Trial:
    """UltraChat rows: `prompt` repeats the first message of `messages`."""

    def form(writer: Writer) -> Any:
        ask, answer = writer.text(), writer.text()
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        return {"prompt": ask, "prompt_id": "ab", "messages": messages}, answer, [ask]

    return _rows(chance, folder, "UltraChat", form)


def choices(chance: random.Random, folder: Path) -> Trial:
    """The answer to a question with choices is meaningless without the choices."""
    writer = Writer(chance)
    rows = [
        {"question": writer.text(), "choices": [writer.text(), writer.text()], "answer": answer}
        for answer in ("A", "B", 1)
    ]
    return refused("questions with choices", files.write(folder, "r.jsonl", files.jsonl(rows)))


def slim_orca(chance: random.Random, folder: Path) -> Trial:
    """ShareGPT rows with weights, some of which are null or floats."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    chats = [writer.chat(["system", "weights"], 2) for _ in range(3)]
    rows = [chat_row(chat, format, "sharegpt") for chat in chats]
    for row, chat in zip(rows, chats, strict=True):
        for told, turn in zip(row.value["conversations"], chat, strict=True):
            told["weight"] = float(turn.weight) if turn.role == "assistant" else None
    path = files.write(folder, "r.jsonl", files.jsonl([row.value for row in rows]))
    return judged("SlimOrca", path, rows, format)


def marked_turns(chance: random.Random, folder: Path) -> Trial:
    """Keys that other trainers use to mark turns as context only."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    key, value = chance.choice(
        [("train", False), ("trainable", False), ("loss", False), ("loss_mask", 0),
         ("masked", True), ("mask", 1), ("train_turn", False)]
    )  # fmt: skip
    chat = [Turn("user", writer.text()), Turn("assistant", writer.text(), weight=0)]
    chat += [Turn("user", writer.text()), Turn("assistant", writer.text())]
    row = chat_row(chat, format)
    del row.value["messages"][1]["weight"]
    row.value["messages"][1][key] = value
    path = files.write(folder, "r.jsonl", files.jsonl([row.value]))
    return judged(f"{key}: {value} in a message", path, [row], format, "may")


def function_roles(chance: random.Random, folder: Path) -> Trial:
    """LLaMA-Factory's ShareGPT rows: function_call, observation, and tools as JSON text."""
    writer, format = Writer(chance), BY_NAME["tooled"]
    chats = [writer.chat(["calls"], 1) for _ in range(3)]
    chats = [[c[0], Turn("assistant", "", calls=c[1].calls[:1]), *c[2:]] for c in chats]
    rows = [chat_row(chat, format) for chat in chats]
    for row, chat in zip(rows, chats, strict=True):
        called = {"name": chat[1].calls[0][0], "arguments": chat[1].calls[0][1]}
        row.value.clear()
        row.value["conversations"] = [
            {"from": "human", "value": chat[0].text},
            {"from": "function_call", "value": json.dumps(called)},
            {"from": "observation", "value": chat[2].text},
            {"from": "gpt", "value": chat[3].text},
        ]
        row.value["tools"] = json.dumps(tools_of(chat))
    path = files.write(folder, "r.jsonl", files.jsonl([row.value for row in rows]))
    return judged("function_call and observation", path, rows, format, "may")


def words_and_call(chance: random.Random, folder: Path) -> Trial:
    """A turn that contains text and a tool call."""
    writer, format = Writer(chance), BY_NAME["tooled"]
    chats = [writer.chat(["calls"], 1) for _ in range(3)]
    chats = [[c[0], Turn("assistant", writer.text(), calls=c[1].calls), *c[2:]] for c in chats]
    rows = [chat_row(chat, format, "openai") for chat in chats]
    path = files.write(folder, "r.jsonl", files.jsonl([row.value for row in rows]))
    return judged("words and a call in one turn", path, rows, format)


def other_tasks(chance: random.Random, folder: Path) -> Trial:
    """Rows for other kinds of training."""
    writer = Writer(chance)
    kinds: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("token ids", lambda: {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}),
        ("KTO", lambda: {"prompt": writer.text(), "completion": writer.text(), "label": True}),
        ("translation", lambda: {"translation": {"en": writer.text(), "de": writer.text()}}),
        ("segments", lambda: {"segments": [{"label": True, "text": writer.text()}]}),
        ("Capybara", lambda: {"conversation": [{"input": "a", "output": writer.text()}]}),
        ("steps", lambda: {"prompt": writer.text(), "completions": ["a"], "labels": [True]}),
    ]
    name, form = chance.choice(kinds)
    rows = [form() for _ in range(3)]
    return refused(f"rows of {name}", files.write(folder, "r.jsonl", files.jsonl(rows)))


def begun_answer(chance: random.Random, folder: Path) -> Trial:
    """TRL prompts that end with the beginning of the answer."""
    writer = Writer(chance)
    rows = [
        {
            "prompt": [
                {"role": "user", "content": writer.text()},
                {"role": "assistant", "content": "Sure,"},
            ],
            "completion": [{"role": "assistant", "content": f" {writer.text()}"}],
        }
        for _ in range(3)
    ]
    path = files.write(folder, "r.jsonl", files.jsonl(rows))
    return refused("a prompt that begins the answer", path)


def rendered(chance: random.Random, folder: Path) -> Trial:
    """Chats already rendered with a template: control tokens as text do not make a chat."""
    writer = Writer(chance)
    texts = [
        f"<|im_start|>user\n{writer.text()}<|im_end|>\n"
        f"<|im_start|>assistant\n{writer.text()}<|im_end|>\n"
        for _ in range(3)
    ]
    path = files.write(folder, "r.jsonl", files.jsonl([{"text": text} for text in texts]))
    return refused("rendered chats as text", path)


QUIRKS: tuple[Quirk, ...] = (
    dolly, squad, open_orca, ultrachat, choices, slim_orca, marked_turns, function_roles,
    words_and_call, begun_answer, other_tasks, rendered,
)  # fmt: skip
