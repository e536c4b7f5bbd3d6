"""Trials with unusual or defective chats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets

from bench.input_trials import files
from bench.input_trials.chat_formats import FORMATS, Turn
from bench.input_trials.reading import (
    BY_NAME,
    SOUND,
    Quirk,
    judged,
    plain_rows,
    read,
    refused,
    saved,
)  # fmt: skip
from bench.input_trials.rows import (
    FLAT,
    FORMS,
    Form,
    Row,
    Seen,
    Writer,
    chat_row,
    flat_row,
    make_row,
)  # fmt: skip
from bench.input_trials.trial import Trial


def left_out(chance: random.Random, folder: Path) -> Trial:
    """Features that the template does not write."""
    writer, format = Writer(chance), chance.choice(FORMATS[:-1])
    dropped = sorted((format.drops | format.refuses) - {"tools", "tool"})
    feature = chance.choice(dropped or ["system"])
    rows = [chat_row(writer.chat([feature]), format) for _ in range(3)]
    rows += [chat_row(writer.chat(), format) for _ in range(2)]
    path = saved(folder, rows)
    return judged(f"template without {feature}", path, rows, format, "may", (feature, "tool"))


def endless(chance: random.Random, folder: Path) -> Trial:
    """A template without an end-of-turn token: EOS is added, or a note reports it."""
    writer, format = Writer(chance), BY_NAME["endless"]
    rows = [chat_row(writer.chat(turns=1), format) for _ in range(4)]
    path = saved(folder, rows)

    def wrong(seen: list[Seen]) -> str | None:
        answers = [answer for each in seen for _, answer in each.pairs]
        return None if all(a.endswith("⟦<eos>⟧") for a in answers) else f"learned: {answers}"

    ends = ("end-of-turn", "end of turn", "ends", "stop")
    name = "template without an end of turn"
    return Trial(name, lambda: read(path, format), wrong, "may", excused=ends)


def content_parts(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    rows = [chat_row(writer.chat(), format, parts=True) for _ in range(4)]
    return judged("content as a list of text parts", saved(folder, rows), rows, format)


def image_part(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
    parts = rows[0].value["messages"][0]
    parts["content"] = [
        {"type": "text", "text": parts["content"]},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
    ]
    return refused("a part that is an image", saved(folder, rows), format)


def encoded_arguments(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME["tooled"]
    rows = [chat_row(writer.chat(["calls"]), format, "openai") for _ in range(4)]
    return judged("arguments as JSON text", saved(folder, rows), rows, format)


def arrow_nulls(chance: random.Random, folder: Path) -> Trial:
    """Parquet adds the arguments of all other calls to each call, as nulls."""
    writer, format = Writer(chance), BY_NAME["tooled"]
    chats = [
        [
            Turn("user", writer.text()),
            Turn("assistant", "", calls=((f"tool{n}", {f"of_tool{n}": writer.text()}),)),
        ]
        for n in range(4)
    ]
    rows = [chat_row(chat, format) for chat in chats]
    values = [row.value for row in rows]
    if chance.random() < 0.5:
        path = files.write(folder, "rows.parquet", files.parquet(values))
        return judged("calls with nulls by Parquet", path, rows, format)
    return judged("calls with nulls by datasets", datasets.Dataset.from_list(values), rows, format)


def broken_arguments(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME["tooled"]
    rows = [chat_row(writer.chat(["calls"]), format, "openai") for _ in range(3)]
    first = rows[0].value["messages"][1]["tool_calls"][0]["function"]
    first["arguments"] = chance.choice(['{"a": ', "not JSON", '["a"]', "7"])
    return refused("arguments that are no JSON object", saved(folder, rows), format)


def empty_answer(chance: random.Random, folder: Path) -> Trial:
    writer, format, rows = plain_rows(chance)
    chat = writer.chat(turns=1)
    chat[-1] = Turn("assistant", chance.choice(["", " ", "\n"]))
    bad = chat_row(chat, format)
    path = saved(folder, [*rows, bad])
    return judged("an empty answer", path, rows, format, "must", ("empty",))


def empty_output(chance: random.Random, folder: Path) -> Trial:
    """An empty answer, as in some Alpaca rows."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    form: Form = chance.choice(["alpaca", "question-answer", "prompt-completion"])
    rows = [flat_row(form, writer, format) for _ in range(4)]
    answer = {"alpaca": "output", "question-answer": "answer"}.get(form, "completion")
    bad = {**rows[0].value, answer: ""}
    path = files.write(folder, "r.jsonl", files.jsonl([*(r.value for r in rows), bad]))
    return judged(f"an empty answer in {form}", path, rows, format, "must", ("empty",))


def weights(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    rows = [chat_row(writer.chat(["weights"], 3), format) for _ in range(4)]
    return judged("weights of 0 and 1", saved(folder, rows), rows, format)


def odd_weight(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
    value = chance.choice([0.5, 2, -1, "0", "high", [1]])
    rows[0].value["messages"][-1]["weight"] = value
    return refused(f"a weight of {value!r}", saved(folder, rows), format)


def control_text(chance: random.Random, folder: Path) -> Trial:
    """The string of a control token inside a text must be read as text."""
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    rows = []
    for _ in range(4):
        chat = writer.chat(turns=1)
        which = chance.randrange(len(chat))
        inside = f"{chat[which].text} {chance.choice(format.special)} more {writer.text()}"
        chat[which] = Turn(chat[which].role, inside)
        rows.append(chat_row(chat, format))
    return judged("control tokens in a message", saved(folder, rows), rows, format, "may")


def control_inplain_rows(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    rows = [flat_row(chance.choice(FLAT), writer, format) for _ in range(3)]
    text = f"{writer.text()} {chance.choice(format.special)} {writer.text()}"
    rows.append(Row({"text": text}, whole=text))
    return judged("control tokens in plain text", saved(folder, rows), rows, format, "may")


def odd_roles(chance: random.Random, folder: Path) -> Trial:
    """Roles with unusual spellings: read as what they mean, or rejected."""
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "tooled", "llama3"])]
    chats = [writer.chat(turns=1) for _ in range(4)]
    rows = [chat_row(chat, format) for chat in chats]
    new = chance.choice(["Assistant", "ASSISTANT", "gpt", "bot", "model", "assistant "])
    for row in rows:
        row.value["messages"][-1]["role"] = new
    return judged(f"role {new!r}", saved(folder, rows), rows, format, "may")


def no_answer(chance: random.Random, folder: Path) -> Trial:
    writer, format, rows = plain_rows(chance)
    bad = {"messages": [{"role": "user", "content": writer.text()}]}
    path = files.write(folder, "r.jsonl", files.jsonl([*(r.value for r in rows), bad]))
    return judged("a chat without an answer", path, rows, format, "must", ("answer", "assistant"))


def unanswered_end(chance: random.Random, folder: Path) -> Trial:
    """A last question without an answer must not change what is learned."""
    writer, format, rows = plain_rows(chance)
    for row in rows[:2]:
        row.value["messages"].append({"role": "user", "content": writer.text()})
    return judged("a last question without an answer", saved(folder, rows), rows, format, "may")


def bad_message(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
    value: Any = chance.choice(
        [
            {"role": "user"}, {"content": "x"}, {"role": "user", "content": None},
            {"role": "user", "content": 7}, {"role": "user", "content": {"text": "x"}}, "user: x",
            None, ["user", "x"], {"role": None, "content": "x"}, {"Role": "user", "Content": "x"},
            {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": []},
            {"role": "user", "content": ["x"]}, {"role": "user", "content": float("nan")},
        ]
    )  # fmt: skip
    rows[1].value["messages"][0] = value
    return refused(f"the message {value!r}", saved(folder, rows), format)


def bad_messages(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
    value: Any = chance.choice([[], None, {}, "hello", 7, [[]], True, {"role": "user"}])
    rows[1].value["messages"] = value
    return refused(f"messages: {value!r}", saved(folder, rows), format)


def messages_as_text(chance: random.Random, folder: Path) -> Trial:
    """Messages as JSON text in a table cell: read, or rejected."""
    _, format, rows = plain_rows(chance)
    cells = [{"messages": json.dumps(row.value["messages"])} for row in rows]
    kind = chance.choice(["csv", "parquet", "jsonl"])
    path = files.write(folder, f"r.{kind}", files.content(cells, kind))
    return judged(f"messages as JSON text in {kind}", path, rows, format, "may")


def preferences(chance: random.Random, folder: Path) -> Trial:
    """Rows with a better and a worse answer have no unambiguous reading."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    values: list[dict[str, Any]] = []
    for _ in range(4):
        prompt, good, bad = writer.text(), writer.text(), writer.text()
        if chance.random() < 0.5:
            values.append({"prompt": prompt, "chosen": good, "rejected": bad})
        else:
            ask = {"role": "user", "content": prompt}
            pair = [[ask, {"role": "assistant", "content": text}] for text in (good, bad)]
            values.append({"chosen": pair[0], "rejected": pair[1]})
    return refused("preference pairs", files.write(folder, "r.jsonl", files.jsonl(values)), format)


def legacy_functions(chance: random.Random, folder: Path) -> Trial:
    """OpenAI's older `functions` and `function_call`: read as tools, rejected, or noted."""
    writer, format = Writer(chance), BY_NAME[chance.choice(["tooled", "chatml"])]
    chats = [writer.chat(["calls"], 1) for _ in range(3)]
    chats = [[c[0], Turn("assistant", "", calls=c[1].calls[:1])] for c in chats]
    rows = [chat_row(chat, format) for chat in chats]
    for row in rows:
        tools = row.value.pop("tools")
        row.value["functions"] = [tool["function"] for tool in tools]
        told = row.value["messages"][1]
        called = told.pop("tool_calls")[0]["function"]
        told["content"] = None
        told["function_call"] = {**called, "arguments": json.dumps(called["arguments"])}
    path = saved(folder, rows)
    return judged("functions and function_call", path, rows, format, "may")


def unknown_keys(chance: random.Random, folder: Path) -> Trial:
    """Additional keys: bookkeeping is ignored, but nothing that might matter is lost."""
    writer, format, rows = plain_rows(chance)
    for row in rows:
        row.value.update(id=writer.count, source="web", score=0.5, meta={"n": [1, None]})
    return judged("bookkeeping next to messages", saved(folder, rows), rows, format)


def two_forms(chance: random.Random, folder: Path) -> Trial:
    """Rows in several forms in one file."""
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "llama3"])]
    forms = chance.sample(FORMS, 3)
    rows = [make_row(form, writer, format) for form in forms for _ in range(2)]
    return judged("several forms in one file", saved(folder, rows), rows, format)


def two_forms_in_a_row(chance: random.Random, folder: Path) -> Trial:
    """A row with messages and a second form with a different content."""
    writer, format, rows = plain_rows(chance)
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    others: list[dict[str, Any]] = [
        {"conversations": turns},
        {"prompt": writer.text(), "completion": writer.text()},
        {"instruction": writer.text(), "input": "", "output": writer.text()},
    ]
    rows[0].value.update(chance.choice(others))
    return judged("two forms in one row", saved(folder, rows), rows, format, "may")


def reasoning_names(chance: random.Random, folder: Path) -> Trial:
    """Reasoning under other keys: `reasoning`, `thinking`."""
    writer, format = Writer(chance), BY_NAME["tooled"]
    rows = [chat_row(writer.chat(["reasoning"], 1), format) for _ in range(4)]
    key = chance.choice(["reasoning", "thinking"])
    for row in rows:
        told = row.value["messages"][-1]
        told[key] = told.pop("reasoning_content")
    return judged(f"reasoning under `{key}`", saved(folder, rows), rows, format, "may")


def system_key(chance: random.Random, folder: Path) -> Trial:
    """A system message under a separate key, as in ShareGPT and Alpaca files."""
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "llama3", "mistral"])]
    chats = [writer.chat(["system"], 1) for _ in range(4)]
    form: Form = chance.choice(["sharegpt", "messages"])
    rows = [chat_row(chat, format, form) for chat in chats]
    for row in rows:
        turns = row.value["conversations" if form == "sharegpt" else "messages"]
        first = turns.pop(0)
        row.value["system"] = first.get("value") or first.get("content")
    return judged(f"`system` next to {form}", saved(folder, rows), rows, format, "may")


def history(chance: random.Random, folder: Path) -> Trial:
    """Alpaca with earlier turns in `history`, as in LLaMA-Factory."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    rows = []
    for _ in range(3):
        row = flat_row("alpaca", writer, format)
        earlier = [[writer.text(), writer.text()]]
        rows.append(Row({**row.value, "history": earlier}, row.learned))

    def wrong(seen: list[Seen]) -> str | None:
        for row in rows:
            for text in row.value["history"][0]:
                if not any(text in each.whole for each in seen):
                    return f"the earlier turn {text!r} is missing"
        return None

    path = saved(folder, rows)
    return Trial("Alpaca with history", lambda: read(path, format), wrong, "may")


QUIRKS: tuple[Quirk, ...] = (
    left_out, endless, content_parts, image_part, encoded_arguments, arrow_nulls,
    broken_arguments, empty_answer, empty_output, weights, odd_weight, control_text,
    odd_roles, no_answer, unanswered_end, bad_message, bad_messages, messages_as_text,
    preferences, legacy_functions, unknown_keys, two_forms, two_forms_in_a_row, reasoning_names,
    system_key, history,
)  # fmt: skip
