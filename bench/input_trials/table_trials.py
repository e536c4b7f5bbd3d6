"""Trials with labeled texts of a classification task and with files of prompts."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from bench.input_trials import files
from bench.input_trials.rows import Writer
from bench.input_trials.trial import Refusal, Trial
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.classify.task_texts import Texts, prepare_texts
from stillhouse.progress import note
from stillhouse.synthesis.prompts import read_prompts

LABELS = ("sport", "city news", "Börse", "ciência", "खेल", "not spam", "spam", "card_arrival")
Gold = dict[str, str | None]
"""Each text and its label, or None if the label is unknown."""


def make(chance: random.Random, folder: Path, number: int) -> Trial:
    if number % 3 == 0:
        return sound(chance, folder)
    return QUIRKS[(number * 2 // 3) % len(QUIRKS)](chance, folder)


# --- labeled texts --------------------------------------------------------------------------


def _labeled(chance: random.Random, count: int = 40) -> tuple[list[str], list[str]]:
    """Make texts with labels, such that every label occurs."""
    writer = Writer(chance)
    names = chance.sample(LABELS, chance.randint(2, 5))
    return [writer.text() for _ in range(count)], [names[n % len(names)] for n in range(count)]


def read_labeled(path: Path, text: str = "text", label: str = "label") -> Texts:
    raw: dict[str, Any] = {
        "name": "tiny",
        "task": {"kind": "classify"},
        "teacher": {"model": "none"},
        "data": {"texts": [{"path": path.name, "text": text, "label": label}]},
        "student": {"start": "random"},
    }
    texts = prepare_texts(ClassifyRecipe.model_validate(raw), path.parent)
    for text in texts.notes:  # the stage prints these notes; `check` shows them as warnings
        note(text)
    return texts


def judged(
    name: str,
    path: Path,
    gold: Gold,
    refusal: Refusal = "never",
    excused: tuple[str, ...] = (),
    **keys: str,
) -> Trial:
    """A trial that is right if exactly these texts are read, each with its label."""

    def wrong(texts: Texts) -> str | None:
        found = {row.text: row.gold for row in texts.all}
        if found == gold:
            return None
        odd = [(text, found.get(text), gold.get(text)) for text in {*found, *gold}]
        return f"text, read, meant: {[each for each in odd if each[1] != each[2]][:4]}"

    return Trial(name, lambda: read_labeled(path, **keys), wrong, refusal, excused=excused)


def refused(name: str, path: Path, excused: tuple[str, ...] = ()) -> Trial:
    def wrong(texts: Texts) -> str:
        return f"read as {texts.labels}"

    return Trial(name, lambda: read_labeled(path), wrong, "must", excused=excused)


def _values(texts: Sequence[str], labels: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"text": t, "label": lab} for t, lab in zip(texts, labels, strict=True)]


def sound(chance: random.Random, folder: Path) -> Trial:
    texts, labels = _labeled(chance)
    gold: Gold = dict(zip(texts, labels, strict=True))
    kind = chance.choice(["csv", "tsv", "jsonl", "json", "json object", "parquet"])
    values: list[dict[str, Any]] = _values(texts, labels)
    for row in chance.sample(values, 3):  # an empty cell is an unknown label
        row["label"], gold[row["text"]] = None, None
    keys = chance.choice([("text", "label"), ("sentence", "category"), ("Текст", "étiquette")])
    values = [
        {keys[0]: row["text"], keys[1]: row["label"], "id": n} for n, row in enumerate(values)
    ]
    data = files.content(values, kind, chance)
    if kind in ("csv", "tsv", "jsonl") and chance.random() < 0.3:
        data = b"\xef\xbb\xbf" + data
    packed = chance.choice(["", "", ".gz", ".zst"])
    path = files.write(folder, f"t.{kind.split()[0]}{packed}", files.compress(data, packed))
    return judged(f"sound: labels in {kind}{packed}", path, gold, text=keys[0], label=keys[1])


def class_label(chance: random.Random, folder: Path) -> Trial:
    """Label names in the file's schema, as `datasets` stores them."""
    texts, labels = _labeled(chance)
    names = sorted(set(labels))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"text": texts, "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "t.parquet"))
    gold: Gold = dict(zip(texts, labels, strict=True))
    return judged("names of labels in the schema", folder / "t.parquet", gold, "may", ("number",))


def no_class(chance: random.Random, folder: Path) -> Trial:
    """-1 in a column of named labels means an unknown label."""
    texts, labels = _labeled(chance)
    names = sorted(set(labels))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    ids = [-1 if n % 5 == 0 else names.index(label) for n, label in enumerate(labels)]
    rows = {"text": texts, "label": ids}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "t.parquet"))
    pairs = zip(texts, ids, strict=True)
    gold: Gold = {text: None if number < 0 else names[number] for text, number in pairs}
    return judged("-1 among named labels", folder / "t.parquet", gold, "may", ("number",))


def numbers(chance: random.Random, folder: Path) -> Trial:
    """Numbers as labels, with missing values that turn them into floats."""
    texts, _ = _labeled(chance)
    ids = [n % 3 for n in range(len(texts))]
    gold: Gold = {text: str(n) for text, n in zip(texts, ids, strict=True)}
    kind = chance.choice(["jsonl", "parquet", "floats", "floats with gaps"])
    if kind == "jsonl":
        path = files.write(folder, "t.jsonl", files.jsonl(_values(texts, ids)))
    else:
        column: list[Any] = [float(n) for n in ids] if "floats" in kind else list(ids)
        if "gaps" in kind:
            column[3], gold[texts[3]] = float("nan"), None
        pq.write_table(pa.table({"text": texts, "label": column}), folder / "t.parquet")
        path = folder / "t.parquet"
    return judged(f"numbers as labels: {kind}", path, gold, "may", ("number",))


def odd_labels(chance: random.Random, folder: Path) -> Trial:
    texts, labels = _labeled(chance)
    odd = chance.choice([["a", "b"], {"a": 1}, ["a"], [], 1.5])
    path = files.write(folder, "t.jsonl", files.jsonl(_values(texts, [odd, *labels[1:]])))
    numbers = () if isinstance(odd, list | dict) else ("number",)
    return refused(f"the label {odd!r}", path, numbers)


def truth_values(chance: random.Random, folder: Path) -> Trial:
    texts, _ = _labeled(chance)
    flags = [n % 2 == 0 for n in range(len(texts))]
    path = files.write(folder, "t.jsonl", files.jsonl(_values(texts, flags)))

    def wrong(found: Texts) -> str | None:
        expected = {t: str(f).casefold() for t, f in zip(texts, flags, strict=True)}
        read = {row.text: (row.gold or "").casefold() for row in found.all}
        return None if read == expected else f"labels {found.labels}"

    return Trial("true and false as labels", lambda: read_labeled(path), wrong, "may")


def two_labels(chance: random.Random, folder: Path) -> Trial:
    """A text that occurs with two labels."""
    texts, labels = _labeled(chance)
    other = next(label for label in labels if label != labels[0])
    again = chance.choice([texts[0], texts[0].upper(), f"  {texts[0]} "])
    values = _values([*texts, again], [*labels, other])
    path = files.write(folder, "t.jsonl", files.jsonl(values))
    return refused("one text with two labels", path, ("label",))


def spellings(chance: random.Random, folder: Path) -> Trial:
    """Labels that differ only in case, white space, or Unicode form: one label, or rejected."""
    texts, _ = _labeled(chance)
    name, other = chance.choice(
        [
            ("Börse", unicodedata.normalize("NFD", "Börse")), ("spam", "Spam"), ("spam", " spam"),
            ("city news", "city\u00a0news"), ("spam", "ｓｐａｍ"), ("ﬁne", "fine"),
        ]
    )  # fmt: skip
    labels = [(name, "ham", other)[n % 3] for n in range(len(texts))]
    path = files.write(folder, "t.jsonl", files.jsonl(_values(texts, labels)))

    def wrong(found: Texts) -> str | None:
        return f"labels {list(found.labels)}" if len(found.labels) != 2 else None

    return Trial(f"labels {name!r} and {other!r}", lambda: read_labeled(path), wrong, "may")


def cells(chance: random.Random, folder: Path) -> Trial:
    """Rows whose cells do not match the header."""
    texts, labels = _labeled(chance)
    text = files.table(_values(texts, labels))
    name, text = chance.choice(
        [
            ("an unquoted comma", f"{text}Write to Ann, please,spam\r\n"),
            ("a cell too few", f"{text}Hello\r\n"),
            ("equal columns", text.replace("text,label", "text,text")),
            ("two label columns", text.replace("text,label", "text,label,label")),
            ("no header", text.split("\r\n", 1)[1]),
            ("another column", text.replace("label", "klass", 1)),
            ("an open quote", f'{text}"Hello,spam\r\n'),
            ("an empty text", f"{text},spam\r\n"),
        ]
    )
    return refused(f"csv: {name}", files.write(folder, "t.csv", text))


def table_files(chance: random.Random, folder: Path) -> Trial:
    """Files whose content does not match their name."""
    texts, labels = _labeled(chance)
    values = _values(texts, labels)
    gold: Gold = dict(zip(texts, labels, strict=True))
    kind, name = chance.choice(
        [
            ("json", "t.jsonl"), ("jsonl", "t.json"), ("csv", "t.dat"), ("csv", "t.tsv"),
            ("tsv", "t.csv"), ("jsonl", "t.txt"), ("parquet", "t.csv"), ("csv", "t.xls"),
        ]
    )  # fmt: skip
    path = files.write(folder, name, files.content(values, kind))
    return judged(f"{kind} named {name}", path, gold, "may")


def table_encodings(chance: random.Random, folder: Path) -> Trial:
    texts, labels = _labeled(chance)
    gold: Gold = dict(zip(texts, labels, strict=True))
    kind = chance.choice(["csv", "tsv"])
    encoding = chance.choice(["utf-16", "utf-16-le", "utf-8-sig"])
    text = files.table(_values(texts, labels), "," if kind == "csv" else "\t")
    path = files.write(folder, f"t.{kind}", text.encode(encoding))
    return judged(f"{kind} in {encoding}", path, gold, "may")


def no_table(chance: random.Random, folder: Path) -> Trial:
    name, data = chance.choice(
        [
            ("Git LFS pointer", files.LFS_POINTER), ("empty", ""), ("header only", "text,label\n"),
            ("HTML", "<html>\n<body>\nNot found\n</body>\n</html>\n"),
            ("half a surrogate pair", ""),
        ]
    )  # fmt: skip
    if name.startswith("half"):
        texts, labels = _labeled(chance)
        lines = files.jsonl(_values(texts, labels)) + '{"text": "x \\ud83d y", "label": "sport"}\n'
        return refused(name, files.write(folder, "t.jsonl", lines))
    return refused(f"{name} as csv", files.write(folder, "t.csv", data))


def huge_label(chance: random.Random, folder: Path) -> Trial:
    texts, labels = _labeled(chance)
    gold: Gold = dict(zip(texts, labels, strict=True))
    lines = files.jsonl(_values(texts, labels)).splitlines()
    lines[2] = f'{lines[2][:-1]}, "n": {"7" * 5000}}}'
    path = files.write(folder, "t.jsonl", "\n".join(lines))
    return judged("a number of 5,000 digits in a key", path, gold, "may")


# --- prompts ---------------------------------------------------------------------------------


def prompts(name: str, path: Path, expected: Sequence[Any], refusal: Refusal = "never") -> Trial:
    """A trial that is right if exactly these messages are sent, in this order."""

    def wrong(found: list[Any]) -> str | None:
        read = [[(m["role"], m.get("content")) for m in prompt.messages] for prompt in found]
        return None if read == list(expected) else f"read {read[:3]}, meant {list(expected)[:3]}"

    return Trial(name, lambda: list(read_prompts(path)), wrong, refusal)


def prompt_rows(chance: random.Random, folder: Path) -> Trial:
    writer = Writer(chance)
    texts = [writer.text() for _ in range(5)]
    kind = chance.choice(["jsonl", "csv", "tsv", "json", "parquet"])
    path = files.write(folder, f"p.{kind}", files.content([{"prompt": t} for t in texts], kind))
    return prompts(f"prompts in {kind}", path, [[("user", text)] for text in texts])


def prompt_lines(chance: random.Random, folder: Path) -> Trial:
    writer = Writer(chance)
    texts = [writer.text(0) for _ in range(5)]
    end = chance.choice(["\n", "\r\n"])
    encoding = chance.choice(["utf-8", "utf-8-sig", "utf-16"])
    path = files.write(folder, "p.txt", (end.join(texts) + end).encode(encoding))
    refusal: Refusal = "may" if encoding == "utf-16" else "never"
    return prompts(f"lines in {encoding}", path, [[("user", text)] for text in texts], refusal)


def chat_logs(chance: random.Random, folder: Path) -> Trial:
    """Logged chats: everything before the last answer is the prompt."""
    writer = Writer(chance)
    rows, expected = [], []
    for _ in range(4):
        chat = writer.chat(["system"] if chance.random() < 0.5 else [])
        told = [{"role": turn.role, "content": turn.text} for turn in chat]
        place = chance.choice(["messages", "request", "body"])
        rows.append({"messages": told} if place == "messages" else {place: {"messages": told}})
        expected.append([(turn.role, turn.text) for turn in chat[:-1]])
    return prompts("logs", files.write(folder, "p.jsonl", files.jsonl(rows)), expected)


def bad_prompts(chance: random.Random, folder: Path) -> Trial:
    writer = Writer(chance)
    good = {"prompt": writer.text()}
    bad: Any = chance.choice(
        [{"prompt": ""}, {"prompt": None}, {"prompt": 7}, {"text": ["x"]}, {"messages": []}, {},
         {"prompt": "x \ud83d"}, {"messages": [{"role": "assistant", "content": "x"}]},
         {"messages": [{"content": "x"}]}]
    )  # fmt: skip
    path = files.write(folder, "p.jsonl", files.jsonl([good, bad], ascii=True))
    return Trial(
        f"the prompt {json.dumps(bad)}",
        lambda: [p.messages for p in read_prompts(path)],
        lambda found: f"read {found!r}",
        "must",
    )


QUIRKS: tuple[Callable[[random.Random, Path], Trial], ...] = (
    class_label, no_class, numbers, odd_labels, truth_values, two_labels, spellings, cells,
    table_files, table_encodings, no_table, huge_label, prompt_rows, prompt_lines, chat_logs,
    bad_prompts,
)  # fmt: skip
