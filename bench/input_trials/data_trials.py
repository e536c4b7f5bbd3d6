"""Files of training data: sound ones in every form, and odd or damaged ones.

Half of the trials are sound combinations of form, chat template, file format, encoding and
compression, which must be learned exactly. The other half go through a list of oddities.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

import stillhouse as sh
from bench.input_trials import files
from bench.input_trials.chat_formats import DATE, FORMATS, ChatFormat, Turn, spelled, tokenizer
from bench.input_trials.rows import (
    FLAT, FORMS, Form, Row, Seen, Writer, chat_row, difference, flat_row, make_row, message,
)  # fmt: skip
from bench.input_trials.trial import Refusal, Trial

BY_NAME = {format.name: format for format in FORMATS}
SOUND = ("chatml", "llama3", "dated", "mistral", "gemma", "tooled")
CONTEXT = 6144
Quirk = Callable[[random.Random, Path], Trial]


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    if number % 2 == 0:
        return sound(chance, folder)
    return QUIRKS[(number // 2) % len(QUIRKS)](chance, folder)


# --- reading ---------------------------------------------------------------------------------


def read(texts: Any, format: ChatFormat, **options: Any) -> list[Seen]:
    """What Stillhouse would train on: one document in a window."""
    heldout = ["Nothing of this is trained on."]
    words = tokenizer(format)
    options = {"context": CONTEXT, "packing": "none", "heldout_tokens": 64, **options}
    train: Any = sh.Data.build(texts, words, heldout=heldout, **options).train
    pad = words.pad_token_id
    seen = []
    for row in range(len(train)):
        ids = np.asarray(train.input_ids_RL[row])
        taught = np.asarray(train.labels_RL[row]) != -100
        length = int(np.flatnonzero(ids != pad)[-1]) + 1
        seen.append(_seen(ids[:length].tolist(), taught[:length].tolist(), format))
    return seen


def _seen(ids: list[int], taught: list[bool], format: ChatFormat) -> Seen:
    pairs, done = [], 0
    for supervised, run in groupby(zip(taught, ids, strict=True), key=lambda each: each[0]):
        part = [token for _, token in run]
        if supervised:
            before = spelled(ids[:done], format)
            pairs.append((_undated(before, format), spelled(part, format)))
        done += len(part)
    return Seen(spelled(ids, format), tuple(pairs), len(ids), sum(taught))


def _undated(text: str, format: ChatFormat) -> str:
    if format.name != "dated":
        return text
    return re.sub(r"(?<=Today Date: )\d\d \w{3} \d{4}", DATE, text)


def judged(
    name: str,
    texts: Any,
    rows: Sequence[Row],
    format: ChatFormat,
    refusal: Refusal = "never",
    lost: tuple[str, ...] = (),
    **options: Any,
) -> Trial:
    """A trial that is right if exactly `rows` are learned."""
    return Trial(
        f"{name} ({format.name})",
        lambda: read(texts, format, **options),
        lambda seen: difference(rows, seen, format),
        refusal,
        lost,
    )


def refused(name: str, texts: Any, format: ChatFormat | None = None, **options: Any) -> Trial:
    """A trial whose input has no right reading."""
    return judged(name, texts, (), format or BY_NAME["chatml"], "must", **options)


# --- sound -----------------------------------------------------------------------------------


def sound(chance: random.Random, folder: Path) -> Trial:
    format = BY_NAME[chance.choice(SOUND)]
    writer = Writer(chance)
    kind = chance.choice(["jsonl", "jsonl", "json", "json object", "csv", "tsv", "parquet"])
    form: Form = chance.choice(FLAT if kind in ("csv", "tsv") else FORMS)
    features = _features(chance, format)
    rows = [make_row(form, writer, format, features) for _ in range(chance.randint(2, 8))]
    try:
        data = files.content([row.value for row in rows], kind, chance)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # arguments of several types in one column
        kind = "jsonl"
        data = files.content([row.value for row in rows], kind, chance)
    if kind != "parquet":
        data = _dressed(data, kind, chance)
    packed = chance.choice(["", "", "", ".gz", ".zst"])
    ending = kind.split(" ")[0]
    name = chance.choice(["rows", "my rows", "Zeilen-äöü", "rows.v2", "[2026] rows"])
    if chance.random() < 0.1:
        ending = ending.upper()
    path = files.write(folder, f"{name}.{ending}{packed}", files.compress(data, packed))
    return judged(f"sound: {form} in {kind}{packed} {'+'.join(features)}", path, rows, format)


def _features(chance: random.Random, format: ChatFormat) -> list[str]:
    """Features that the template writes."""
    candidates = ["system", "developer", "reasoning", "calls", "weights"]
    fine = [
        f for f in candidates if f not in format.drops | format.refuses
        and not (f == "calls" and "tool" in format.refuses)
    ]  # fmt: skip
    chosen = [feature for feature in fine if chance.random() < 0.4]
    return chosen if "system" not in chosen else [f for f in chosen if f != "developer"]


def _dressed(data: bytes, kind: str, chance: random.Random) -> bytes:
    """With a byte order mark, other line ends, blank lines or no last line end."""
    text = data.decode()
    if kind == "jsonl":
        text = text.replace("\n", chance.choice(["\n", "\n", "\r\n", "\n\n"]))
        text = text.rstrip("\r\n") if chance.random() < 0.3 else text
    return text.encode(chance.choice(["utf-8", "utf-8", "utf-8-sig"]))


# --- oddities: chats -------------------------------------------------------------------------


def _plain(chance: random.Random, count: int = 4) -> tuple[Writer, ChatFormat, list[Row]]:
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "llama3", "mistral"])]
    return writer, format, [chat_row(writer.chat(), format) for _ in range(count)]


def _saved(folder: Path, rows: Sequence[Row], name: str = "rows.jsonl") -> Path:
    return files.write(folder, name, files.jsonl([row.value for row in rows]))


def left_out(chance: random.Random, folder: Path) -> Trial:
    """Features that the template does not write."""
    writer, format = Writer(chance), chance.choice(FORMATS[:-1])
    dropped = sorted((format.drops | format.refuses) - {"tools", "tool"})
    feature = chance.choice(dropped or ["system"])
    rows = [chat_row(writer.chat([feature]), format) for _ in range(3)]
    rows += [chat_row(writer.chat(), format) for _ in range(2)]
    path = _saved(folder, rows)
    return judged(f"template without {feature}", path, rows, format, "may", (feature, "tool"))


def endless(chance: random.Random, folder: Path) -> Trial:
    """A template that writes no end-of-turn token: EOS may be put there, or a note says it."""
    writer, format = Writer(chance), BY_NAME["endless"]
    rows = [chat_row(writer.chat(turns=1), format) for _ in range(4)]
    path = _saved(folder, rows)

    def wrong(seen: list[Seen]) -> str | None:
        answers = [answer for each in seen for _, answer in each.pairs]
        return None if all(a.endswith("⟦<eos>⟧") for a in answers) else f"learned: {answers}"

    ends = ("end-of-turn", "end of turn", "ends", "stop")
    name = "template without an end of turn"
    return Trial(name, lambda: read(path, format), wrong, "may", excused=ends)


def content_parts(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    rows = [chat_row(writer.chat(), format, parts=True) for _ in range(4)]
    return judged("content as a list of text parts", _saved(folder, rows), rows, format)


def image_part(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
    parts = rows[0].value["messages"][0]
    parts["content"] = [
        {"type": "text", "text": parts["content"]},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
    ]
    return refused("a part that is an image", _saved(folder, rows), format)


def encoded_arguments(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME["tooled"]
    rows = [chat_row(writer.chat(["calls"]), format, "openai") for _ in range(4)]
    return judged("arguments as JSON text", _saved(folder, rows), rows, format)


def arrow_nulls(chance: random.Random, folder: Path) -> Trial:
    """Parquet gives every call the arguments of all others, as nulls."""
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
    return refused("arguments that are no JSON object", _saved(folder, rows), format)


def empty_answer(chance: random.Random, folder: Path) -> Trial:
    writer, format, rows = _plain(chance)
    chat = writer.chat(turns=1)
    chat[-1] = Turn("assistant", chance.choice(["", " ", "\n"]))
    bad = chat_row(chat, format)
    path = _saved(folder, [*rows, bad])
    return judged("an empty answer", path, rows, format, "must", ("empty",))


def empty_output(chance: random.Random, folder: Path) -> Trial:
    """Alpaca has such rows."""
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
    return judged("weights of 0 and 1", _saved(folder, rows), rows, format)


def odd_weight(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
    value = chance.choice([0.5, 2, -1, "0", "high", [1]])
    rows[0].value["messages"][-1]["weight"] = value
    return refused(f"a weight of {value!r}", _saved(folder, rows), format)


def control_text(chance: random.Random, folder: Path) -> Trial:
    """A text that contains a control token's string is text."""
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    rows = []
    for _ in range(4):
        chat = writer.chat(turns=1)
        which = chance.randrange(len(chat))
        inside = f"{chat[which].text} {chance.choice(format.special)} more {writer.text()}"
        chat[which] = Turn(chat[which].role, inside)
        rows.append(chat_row(chat, format))
    return judged("control tokens in a message", _saved(folder, rows), rows, format, "may")


def control_in_plain(chance: random.Random, folder: Path) -> Trial:
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    rows = [flat_row(chance.choice(FLAT), writer, format) for _ in range(3)]
    text = f"{writer.text()} {chance.choice(format.special)} {writer.text()}"
    rows.append(Row({"text": text}, whole=text))
    return judged("control tokens in plain text", _saved(folder, rows), rows, format, "may")


def odd_roles(chance: random.Random, folder: Path) -> Trial:
    """Roles that are written otherwise: read as what they are, or refused."""
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "tooled", "llama3"])]
    chats = [writer.chat(turns=1) for _ in range(4)]
    rows = [chat_row(chat, format) for chat in chats]
    new = chance.choice(["Assistant", "ASSISTANT", "gpt", "bot", "model", "assistant "])
    for row in rows:
        row.value["messages"][-1]["role"] = new
    return judged(f"role {new!r}", _saved(folder, rows), rows, format, "may")


def no_answer(chance: random.Random, folder: Path) -> Trial:
    writer, format, rows = _plain(chance)
    bad = {"messages": [{"role": "user", "content": writer.text()}]}
    path = files.write(folder, "r.jsonl", files.jsonl([*(r.value for r in rows), bad]))
    return judged("a chat without an answer", path, rows, format, "must", ("answer", "assistant"))


def unanswered_end(chance: random.Random, folder: Path) -> Trial:
    """A last question without an answer changes nothing in what is learned."""
    writer, format, rows = _plain(chance)
    for row in rows[:2]:
        row.value["messages"].append({"role": "user", "content": writer.text()})
    return judged("a last question without an answer", _saved(folder, rows), rows, format, "may")


def bad_message(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
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
    return refused(f"the message {value!r}", _saved(folder, rows), format)


def bad_messages(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
    value: Any = chance.choice([[], None, {}, "hello", 7, [[]], True, {"role": "user"}])
    rows[1].value["messages"] = value
    return refused(f"messages: {value!r}", _saved(folder, rows), format)


def messages_as_text(chance: random.Random, folder: Path) -> Trial:
    """Messages as JSON text in a table's cell: read, or refused."""
    _, format, rows = _plain(chance)
    cells = [{"messages": json.dumps(row.value["messages"])} for row in rows]
    kind = chance.choice(["csv", "parquet", "jsonl"])
    path = files.write(folder, f"r.{kind}", files.content(cells, kind))
    return judged(f"messages as JSON text in {kind}", path, rows, format, "may")


def preferences(chance: random.Random, folder: Path) -> Trial:
    """Rows of two answers, a better and a worse one, have no single right reading."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    values = []
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
    """OpenAI's older `functions` and `function_call`: read as tools, refused, or noted."""
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
    path = _saved(folder, rows)
    return judged("functions and function_call", path, rows, format, "may")


def unknown_keys(chance: random.Random, folder: Path) -> Trial:
    """Keys beside those that are read: bookkeeping is left alone; what may matter is not lost."""
    writer, format, rows = _plain(chance)
    for row in rows:
        row.value.update(id=writer.count, source="web", score=0.5, meta={"n": [1, None]})
    return judged("bookkeeping beside messages", _saved(folder, rows), rows, format)


def two_forms(chance: random.Random, folder: Path) -> Trial:
    """Rows of several forms in one file."""
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "llama3"])]
    forms = chance.sample(FORMS, 3)
    rows = [make_row(form, writer, format) for form in forms for _ in range(2)]
    return judged("several forms in one file", _saved(folder, rows), rows, format)


def two_forms_in_a_row(chance: random.Random, folder: Path) -> Trial:
    """A row with messages and another form beside it that says something else."""
    writer, format, rows = _plain(chance)
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    others: list[dict[str, Any]] = [
        {"conversations": turns},
        {"prompt": writer.text(), "completion": writer.text()},
        {"instruction": writer.text(), "input": "", "output": writer.text()},
    ]
    rows[0].value.update(chance.choice(others))
    return judged("two forms in one row", _saved(folder, rows), rows, format, "may")


def reasoning_names(chance: random.Random, folder: Path) -> Trial:
    """Reasoning under other names: `reasoning`, `thinking`."""
    writer, format = Writer(chance), BY_NAME["tooled"]
    rows = [chat_row(writer.chat(["reasoning"], 1), format) for _ in range(4)]
    key = chance.choice(["reasoning", "thinking"])
    for row in rows:
        told = row.value["messages"][-1]
        told[key] = told.pop("reasoning_content")
    return judged(f"reasoning under `{key}`", _saved(folder, rows), rows, format, "may")


def system_key(chance: random.Random, folder: Path) -> Trial:
    """A system message in a key of its own, as ShareGPT and Alpaca files have it."""
    writer, format = Writer(chance), BY_NAME[chance.choice(["chatml", "llama3", "mistral"])]
    chats = [writer.chat(["system"], 1) for _ in range(4)]
    form: Form = chance.choice(["sharegpt", "messages"])
    rows = [chat_row(chat, format, form) for chat in chats]
    for row in rows:
        turns = row.value["conversations" if form == "sharegpt" else "messages"]
        first = turns.pop(0)
        row.value["system"] = first.get("value") or first.get("content")
    return judged(f"`system` beside {form}", _saved(folder, rows), rows, format, "may")


def history(chance: random.Random, folder: Path) -> Trial:
    """Alpaca with earlier turns in `history`, as LLaMA-Factory has it."""
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
                    return f"the earlier turn {text!r} stands nowhere"
        return None

    path = _saved(folder, rows)
    return Trial("Alpaca with history", lambda: read(path, format), wrong, "may")


# --- oddities: files -------------------------------------------------------------------------


def encodings(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
    encoding = chance.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
    kind = chance.choice(["jsonl", "json"])
    text = files.content([row.value for row in rows], kind).decode()
    path = files.write(folder, f"r.{kind}", text.encode(encoding))
    return judged(f"{kind} in {encoding}", path, rows, format, "may")


def latin(chance: random.Random, folder: Path) -> Trial:
    """In Latin-1 there is no telling what a byte means."""
    value = {"messages": [
        {"role": "user", "content": "Où est le café à Zürich?"},
        {"role": "assistant", "content": "Près de l’église".replace("’", "'")},
    ]}  # fmt: skip
    text = files.jsonl([value, {**value, "id": 2}])
    path = files.write(folder, "r.jsonl", text.encode(chance.choice(["latin-1", "cp1252"])))
    return refused("jsonl in Latin-1", path)


def compression(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
    ending = chance.choice([".gz", ".zst", ".bz2", ".xz"])
    data = files.compress(files.content([row.value for row in rows], "jsonl"), ending)
    how = chance.choice(["sound", "cut", "not compressed", "no ending", "twice"])
    name, refusal = f"r.jsonl{ending}", "may"
    if how == "cut":
        data, refusal = data[: len(data) // 2], "must"
    elif how == "not compressed":
        data = files.content([row.value for row in rows], "jsonl")
    elif how == "no ending":
        name = "r.jsonl"
    elif how == "twice":
        data = files.compress(data, ending)
    path = files.write(folder, name, data)
    return judged(f"{ending}, {how}", path, rows, format, refusal)  # type: ignore[arg-type]


def wrong_ending(chance: random.Random, folder: Path) -> Trial:
    """The name says another format than the file has: read as what it is, or refused."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    rows = [flat_row(chance.choice(["prompt-completion", "text"]), writer, format)]
    rows += [flat_row("prompt-completion", writer, format) for _ in range(3)]
    kind, ending = chance.choice(
        [
            ("jsonl", "json"), ("json", "jsonl"), ("jsonl", "csv"), ("csv", "jsonl"),
            ("parquet", "jsonl"), ("jsonl", "parquet"), ("csv", "tsv"), ("tsv", "csv"),
            ("jsonl", "data"), ("csv", "xlsx"), ("json", "json5"), ("jsonl", "jsonlines"),
            ("json", "md"), ("csv", "parquet"), ("jsonl", "arrow"), ("jsonl", ""),
        ]
    )  # fmt: skip
    if kind in ("csv", "tsv"):
        rows = rows[1:]
    data = files.content([row.value for row in rows], kind)
    path = files.write(folder, f"r.{ending}" if ending else "r", data)
    return judged(f"{kind} named .{ending}", path, rows, format, "may")


def not_data(chance: random.Random, folder: Path) -> Trial:
    kind = chance.choice(["jsonl", "json", "csv", "parquet"])
    name, data = chance.choice(
        [
            ("Git LFS pointer", files.LFS_POINTER),
            ("HTML page", "<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n"),
            ("empty", ""),
            ("blank lines", "\n\n\n"),
            ("zeros", "\0" * 4096),
            ("a PNG", b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
            ("a zip", b"PK\x03\x04" + b"\0" * 40),
            ("Hub error", '{"error": "Repository not found"}\n'),
        ]
    )
    path = files.write(folder, f"r.{kind}", data)
    return refused(f"{name} as {kind}", path)


def broken_json(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
    lines = files.jsonl([row.value for row in rows]).splitlines()
    name, change = chance.choice(
        [
            ("a comma after each line", lambda line: line + ","),
            ("single quotes", lambda line: str(json.loads(line))),
            ("two objects in a line", lambda line: line + line.replace('"user"', '"user" ')),
            ("cut", lambda line: line[:-5]),
            ("a trailing comma", lambda line: line[:-1] + ",}"),
            ("a comment", lambda line: line + " // fine"),
            ("nested lists", lambda line: f"[{line}]"),
            ("a string", lambda line: json.dumps(line)),
        ]
    )
    which = chance.randrange(len(lines))
    lines[which] = change(lines[which])
    path = files.write(folder, "r.jsonl", "\n".join(lines) + "\n")
    return judged(f"jsonl: {name}", path, rows, format, "may")


def pretty_json(chance: random.Random, folder: Path) -> Trial:
    """Objects over several lines, one after the other: read whole, or refused."""
    _, format, rows = _plain(chance)
    text = "\n".join(json.dumps(row.value, indent=2) for row in rows)
    path = files.write(folder, f"r.{chance.choice(['jsonl', 'json'])}", text)
    return judged("pretty-printed objects", path, rows, format, "may")


def double_keys(chance: random.Random, folder: Path) -> Trial:
    """Two equal keys with different values in an object."""
    writer = Writer(chance)
    line = json.dumps({"prompt": writer.text(), "completion": writer.text()})
    double = f'{{"prompt": "{writer.count}", "completion": "one", "completion": "two"}}'
    if chance.random() < 0.5:
        turn = '{"role": "user", "role": "assistant", "content": "x"}'
        double = f'{{"messages": [{{"role": "user", "content": "q"}}, {turn}]}}'
    kind = chance.choice(["jsonl", "json"])
    text = f"{line}\n{double}\n" if kind == "jsonl" else f"[{line}, {double}]"
    return refused(f"equal keys in {kind}", files.write(folder, f"r.{kind}", text))


def csv_cells(chance: random.Random, folder: Path) -> Trial:
    """A table whose cells do not match its header."""
    lines = files.table([{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(5)])
    name, text = chance.choice(
        [
            ("more cells", lines + "one,two,three\r\n"),
            ("fewer cells", lines + "alone\r\n"),
            ("equal columns", lines.replace("prompt,completion", "completion,completion")),
            ("an open quote", lines + '"open,cell\r\n'),
            ("text after a quote", lines + '"a" b,c\r\n'),
            ("header only", "prompt,completion\r\n"),
            ("semicolons", lines.replace(",", ";")),
            ("no header", lines.split("\r\n", 1)[1]),
            ("empty column name", lines.replace("completion", "", 1)),
        ]
    )
    return refused(f"csv: {name}", files.write(folder, "r.csv", text))


def csv_style(chance: random.Random, folder: Path) -> Trial:
    """Tables as Excel and its like write them."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    rows = [flat_row("prompt-completion", writer, format) for _ in range(4)]
    text = files.table([row.value for row in rows])
    how = chance.choice(["byte order mark", "line feeds", "index column", "blank last lines"])
    if how == "byte order mark":
        text = "\ufeff" + text
    elif how == "line feeds":
        text = text.replace("\r\n", "\n")
    elif how == "index column":
        text = files.table([{"": n, **row.value} for n, row in enumerate(rows)])
    else:
        text += "\r\n\r\n"
    path = files.write(folder, "r.csv", text)
    return judged(f"csv with {how}", path, rows, format, "may" if "index" in how else "never")


def no_strings(chance: random.Random, folder: Path) -> Trial:
    """Values that are no text where text has to be."""
    writer = Writer(chance)
    value: Any = chance.choice([None, 7, 2.5, True, ["x"], {"a": 1}, float("nan")])
    bad = {"prompt": writer.text(), "completion": value}
    if chance.random() < 0.3:
        bad = {"text": value}
    good = {"prompt": writer.text(), "completion": writer.text()}
    path = files.write(folder, "r.jsonl", files.jsonl([good, bad]))
    return refused(f"{value!r} for a text", path)


def surrogates(chance: random.Random, folder: Path) -> Trial:
    """Half of a surrogate pair is no character; a whole pair is one."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    if chance.random() < 0.4:
        text = f"{writer.text(0)} 😀"
        data = files.jsonl([{"text": text}], ascii=True)
        path = files.write(folder, "r.jsonl", data)
        return judged("a whole pair", path, [Row({}, whole=text)], format)
    half = chance.choice(["\\ud83d", "\\ude00", "\\ude00\\ud83d"])
    line = f'{{"text": "{writer.text(0)} {half} end"}}\n'
    data = files.jsonl([{"text": writer.text()}]) + line
    return refused("half a surrogate pair", files.write(folder, "r.jsonl", data))


def huge_numbers(chance: random.Random, folder: Path) -> Trial:
    """Python refuses to read integers of more than 4,300 digits."""
    writer, format, rows = _plain(chance)
    lines = files.jsonl([row.value for row in rows]).splitlines()
    value = chance.choice(["9" * 5000, "1e999", "-Infinity", "NaN", "1" + "0" * 400])
    lines[1] = f'{lines[1][:-1]}, "n": {value}}}'
    path = files.write(folder, "r.jsonl", "\n".join(lines))
    return judged(f"the number {value[:12]} in a key", path, rows, format, "may")


def deep(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = _plain(chance)
    lines = files.jsonl([row.value for row in rows]).splitlines()
    depth = chance.choice([200, 2000, 100_000])
    lines[1] = f'{lines[1][:-1]}, "n": {"[" * depth}{"]" * depth}}}'
    path = files.write(folder, "r.jsonl", "\n".join(lines))
    return judged(f"lists {depth} deep in a key", path, rows, format, "may")


def plain_text(chance: random.Random, folder: Path) -> Trial:
    """Text files: paragraphs in any encoding of line ends."""
    writer, format = Writer(chance), BY_NAME[chance.choice(SOUND)]
    texts = [writer.text(0.2).replace("\n", " ") for _ in range(4)]
    end = chance.choice(["\n", "\r\n", "\r"])
    text = (end + end).join(texts) + chance.choice(["", end])
    encoding = chance.choice(["utf-8", "utf-8-sig", "utf-16"])
    path = files.write(folder, "r.txt", text.encode(encoding))
    rows = [Row({}, whole=text) for text in texts]
    refusal: Refusal = "may" if encoding == "utf-16" else "never"
    return judged(f"text in {encoding}, lines end with {end!r}", path, rows, format, refusal)


def names(chance: random.Random, folder: Path) -> Trial:
    """Names of files and folders with characters that patterns use."""
    _, format, rows = _plain(chance)
    inside = chance.choice(["a[1]", "b (copy)", "c?", "d*", "e{x}", "[!f]", "g h", "ü", "~x"])
    path = _saved(folder / inside, rows, chance.choice(["rows.jsonl", "r[0].jsonl", "r (1).jsonl"]))
    decoy = chance.choice(["a1", "r0"])
    _saved(folder / decoy, _plain(chance)[2], "rows.jsonl")
    return judged(f"a folder named {inside!r}", path, rows, format)


def repeated(chance: random.Random, folder: Path) -> Trial:
    """Equal rows count once, which is documented."""
    _, format, rows = _plain(chance)
    return judged("repeated rows", _saved(folder, [*rows, *rows[:2]]), rows, format)


def long_row(chance: random.Random, folder: Path) -> Trial:
    writer, format, rows = _plain(chance)
    chat = [Turn("user", writer.text() * 600), Turn("assistant", writer.text())]
    path = _saved(folder, [*rows, chat_row(chat, format)])
    return refused("a chat longer than the context", path, format)


def nothing_to_read(chance: random.Random, folder: Path) -> Trial:
    (folder / "empty").mkdir()
    files.write(folder, "odd/readme.md", "# Data\n")
    name = chance.choice(["empty", "absent.jsonl", "*.jsonl", "odd", "absent/deep.jsonl"])
    return refused(f"nothing at {name}", folder / name)


def arrow_types(chance: random.Random, folder: Path) -> Trial:
    """Parquet's other types for text: large, dictionary-encoded, binary."""
    writer, format = Writer(chance), BY_NAME["chatml"]
    texts = [writer.text() for _ in range(4)]
    kind = chance.choice(["large_string", "dictionary", "binary", "string_view"])
    column: Any = pa.array(texts)
    column = {
        "large_string": lambda: column.cast(pa.large_string()),
        "dictionary": column.dictionary_encode,
        "binary": lambda: column.cast(pa.binary()),
        "string_view": lambda: column.cast(pa.string_view()),
    }[kind]()
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": column}), folder / "r.parquet")
    rows = [Row({}, whole=text) for text in texts]
    refusal: Refusal = "may" if kind == "binary" else "never"
    return judged(f"parquet text as {kind}", folder / "r.parquet", rows, format, refusal)


def python_objects(chance: random.Random, folder: Path) -> Trial:
    """Rows that are handed over in Python."""
    _, format, rows = _plain(chance)
    texts: Any = [row.value for row in rows]
    how = chance.choice(["rows", "chats", "dataset"])
    if how == "chats":
        texts = [row.value["messages"] for row in rows]
    elif how == "dataset":
        texts = datasets.Dataset.from_list(texts)
    return judged(f"python: {how}", texts, rows, format)


def mixed_lines(chance: random.Random, folder: Path) -> Trial:
    """One row of another shape among many."""
    _, format, rows = _plain(chance)
    odd: Any = chance.choice(
        [{}, {"txt": "x"}, {"message": []}, {"messages_": [message(Turn("user", "x"))]},
         {"prompt": "x"}, {"completion": "x"}, {"role": "user", "content": "x"}, {"0": "a"}]
    )  # fmt: skip
    values = [row.value for row in rows]
    values.insert(chance.randrange(len(values)), odd)
    return refused(f"a row {odd!r}"[:60], files.write(folder, "r.jsonl", files.jsonl(values)))


QUIRKS: tuple[Quirk, ...] = (
    left_out, endless, content_parts, image_part, encoded_arguments, arrow_nulls,
    broken_arguments, empty_answer, empty_output, weights, odd_weight, control_text,
    control_in_plain, odd_roles, no_answer, unanswered_end, bad_message, bad_messages,
    messages_as_text, preferences, legacy_functions, unknown_keys, two_forms, two_forms_in_a_row,
    reasoning_names, system_key, history, encodings, latin, compression, wrong_ending, not_data,
    broken_json, pretty_json, double_keys, csv_cells, csv_style, no_strings, surrogates,
    huge_numbers, deep, plain_text, names, repeated, long_row, nothing_to_read, arrow_types,
    python_objects, mixed_lines,
)  # fmt: skip
