"""Trials with unusual or damaged files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from bench.input_trials import files
from bench.input_trials.chat_formats import Turn
from bench.input_trials.reading import (
    BY_NAME,
    SOUND,
    Quirk,
    judged,
    plain_rows,
    refused,
    saved,
)  # fmt: skip
from bench.input_trials.rows import (
    Row,
    Writer,
    chat_row,
    flat_row,
    message,
)  # fmt: skip
from bench.input_trials.trial import Refusal, Trial


def encodings(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
    encoding = chance.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
    kind = chance.choice(["jsonl", "json"])
    text = files.content([row.value for row in rows], kind).decode()
    path = files.write(folder, f"r.{kind}", text.encode(encoding))
    return judged(f"{kind} in {encoding}", path, rows, format, "may")


def latin(chance: random.Random, folder: Path) -> Trial:
    """Latin-1 text: the bytes do not show which encoding it is."""
    value = {"messages": [
        {"role": "user", "content": "Où est le café à Zürich?"},
        {"role": "assistant", "content": "Près de l’église".replace("’", "'")},
    ]}  # fmt: skip
    text = files.jsonl([value, {**value, "id": 2}])
    path = files.write(folder, "r.jsonl", text.encode(chance.choice(["latin-1", "cp1252"])))
    return refused("jsonl in Latin-1", path)


def compression(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
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
    """An extension that does not match the content: read as what it is, or rejected."""
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
    contents: list[tuple[str, str | bytes]] = [
        ("Git LFS pointer", files.LFS_POINTER),
        ("HTML page", "<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n"),
        ("empty", ""),
        ("blank lines", "\n\n\n"),
        ("zeros", "\0" * 4096),
        ("a PNG", b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
        ("a zip", b"PK\x03\x04" + b"\0" * 40),
        ("Hub error", '{"error": "Repository not found"}\n'),
    ]
    name, data = chance.choice(contents)
    path = files.write(folder, f"r.{kind}", data)
    return refused(f"{name} as {kind}", path)


def broken_json(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
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
    """Consecutive objects that span several lines: read completely, or rejected."""
    _, format, rows = plain_rows(chance)
    text = "\n".join(json.dumps(row.value, indent=2) for row in rows)
    path = files.write(folder, f"r.{chance.choice(['jsonl', 'json'])}", text)
    return judged("pretty-printed objects", path, rows, format, "may")


def double_keys(chance: random.Random, folder: Path) -> Trial:
    """A key that occurs twice in an object, with different values."""
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
    """Tables as Excel and similar programs write them."""
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
    """Values that are not strings where text is required."""
    writer = Writer(chance)
    value: Any = chance.choice([None, 7, 2.5, True, ["x"], {"a": 1}, float("nan")])
    bad = {"prompt": writer.text(), "completion": value}
    if chance.random() < 0.3:
        bad = {"text": value}
    good = {"prompt": writer.text(), "completion": writer.text()}
    path = files.write(folder, "r.jsonl", files.jsonl([good, bad]))
    return refused(f"{value!r} for a text", path)


def surrogates(chance: random.Random, folder: Path) -> Trial:
    """Half of a surrogate pair is not a character; a whole pair is one character."""
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
    _, format, rows = plain_rows(chance)
    lines = files.jsonl([row.value for row in rows]).splitlines()
    value = chance.choice(["9" * 5000, "1e999", "-Infinity", "NaN", "1" + "0" * 400])
    lines[1] = f'{lines[1][:-1]}, "n": {value}}}'
    path = files.write(folder, "r.jsonl", "\n".join(lines))
    return judged(f"the number {value[:12]} in a key", path, rows, format, "may")


def deep(chance: random.Random, folder: Path) -> Trial:
    _, format, rows = plain_rows(chance)
    lines = files.jsonl([row.value for row in rows]).splitlines()
    depth = chance.choice([200, 2000, 100_000])
    lines[1] = f'{lines[1][:-1]}, "n": {"[" * depth}{"]" * depth}}}'
    path = files.write(folder, "r.jsonl", "\n".join(lines))
    return judged(f"lists {depth} deep in a key", path, rows, format, "may")


def plain_text(chance: random.Random, folder: Path) -> Trial:
    """Text files: paragraphs with any kind of line ending."""
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
    """Names of files and folders that contain pattern characters."""
    _, format, rows = plain_rows(chance)
    inside = chance.choice(["a[1]", "b (copy)", "c?", "d*", "e{x}", "[!f]", "g h", "ü", "~x"])
    path = saved(folder / inside, rows, chance.choice(["rows.jsonl", "r[0].jsonl", "r (1).jsonl"]))
    decoy = chance.choice(["a1", "r0"])
    saved(folder / decoy, plain_rows(chance)[2], "rows.jsonl")
    return judged(f"a folder named {inside!r}", path, rows, format)


def repeated(chance: random.Random, folder: Path) -> Trial:
    """Identical rows count once, as documented."""
    _, format, rows = plain_rows(chance)
    return judged("repeated rows", saved(folder, [*rows, *rows[:2]]), rows, format)


def long_row(chance: random.Random, folder: Path) -> Trial:
    writer, format, rows = plain_rows(chance)
    chat = [Turn("user", writer.text() * 600), Turn("assistant", writer.text())]
    path = saved(folder, [*rows, chat_row(chat, format)])
    return refused("a chat longer than the context", path, format)


def nothing_to_read(chance: random.Random, folder: Path) -> Trial:
    (folder / "empty").mkdir()
    files.write(folder, "odd/readme.md", "# Data\n")
    name = chance.choice(["empty", "absent.jsonl", "*.jsonl", "odd", "absent/deep.jsonl"])
    return refused(f"nothing at {name}", folder / name)


def arrow_types(chance: random.Random, folder: Path) -> Trial:
    """Parquet's other text types: large, dictionary-encoded, and binary."""
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
    pq.write_table(pa.table({"text": column}), folder / "r.parquet")
    rows = [Row({}, whole=text) for text in texts]
    refusal: Refusal = "may" if kind == "binary" else "never"
    return judged(f"parquet text as {kind}", folder / "r.parquet", rows, format, refusal)


def python_objects(chance: random.Random, folder: Path) -> Trial:
    """Rows passed as Python objects."""
    _, format, rows = plain_rows(chance)
    texts: Any = [row.value for row in rows]
    how = chance.choice(["rows", "chats", "dataset"])
    if how == "chats":
        texts = [row.value["messages"] for row in rows]
    elif how == "dataset":
        texts = datasets.Dataset.from_list(texts)
    return judged(f"python: {how}", texts, rows, format)


def mixed_lines(chance: random.Random, folder: Path) -> Trial:
    """One row with a different shape among many."""
    _, _, rows = plain_rows(chance)
    odd: Any = chance.choice(
        [{}, {"txt": "x"}, {"message": []}, {"messages_": [message(Turn("user", "x"))]},
         {"prompt": "x"}, {"completion": "x"}, {"role": "user", "content": "x"}, {"0": "a"}]
    )  # fmt: skip
    values = [row.value for row in rows]
    values.insert(chance.randrange(len(values)), odd)
    return refused(f"a row {odd!r}"[:60], files.write(folder, "r.jsonl", files.jsonl(values)))


QUIRKS: tuple[Quirk, ...] = (
    encodings, latin, compression, wrong_ending, not_data, broken_json,
    pretty_json, double_keys, csv_cells, csv_style, no_strings, surrogates,
    huge_numbers, deep, plain_text, names, repeated, long_row,
    nothing_to_read, arrow_types, python_objects, mixed_lines,
)  # fmt: skip
