"""Text larger than memory gives the same windows as in memory, and a killed build resumes."""

from __future__ import annotations

import io
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.commands import prepare_data
from stillhouse.data import build_data
from stillhouse.data.build_data import TOKENIZED, Texts, make_windows
from stillhouse.data.data import Data
from stillhouse.data.data_config import WindowsRecipe
from stillhouse.data.documents import (
    AnyDocument,
    Conversation,
    Document,
    content_hash,
    group_hash,
)
from stillhouse.data.packing import fill_windows, plan_isolated
from stillhouse.data.split import HASH, order_key
from stillhouse.data.token_log import TokenLog
from stillhouse.data.tokenize_rows import TokenRow, tokenize
from stillhouse.data.windows import ARRAYS, Windows
from stillhouse.errors import DataError

from .. import tiny
from .toys import byte_level, chat, write_jsonl

TOKENIZER = byte_level()
CONTEXT = 64
SECTION = WindowsRecipe(context=CONTEXT, heldout_tokens=300)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_data, "_BATCH_DOCUMENTS", 10)


def documents(count: int) -> list[AnyDocument]:
    """Texts and chats, with a duplicate in every ten."""
    return [
        Conversation(tuple(chat(f"what is {n}", f"it is {n * n}")), where=f"chat {n}")
        if n % 3 == 0
        else Document(f"line {n - (n % 10 == 7)} about the fox number", f"line {n}")
        for n in range(count)
    ]


def without_duplicates(texts: list[AnyDocument]) -> list[AnyDocument]:
    return list({content_hash(document): document for document in reversed(texts)}.values())[::-1]


def same(one: Windows, other: Windows) -> bool:
    arrays = ((getattr(one, f"{n}_RL"), getattr(other, f"{n}_RL")) for n in ARRAYS)
    return one.info == other.info and all(np.array_equal(a, b) for a, b in arrays)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[AnyDocument]:
    """Records the tokenized documents. One that contains "KILL" raises KeyboardInterrupt."""
    found: list[AnyDocument] = []

    def recording(texts: list[AnyDocument], *rest: Any) -> Any:
        if any("KILL" in str(document.content()) for document in texts):
            raise KeyboardInterrupt
        found.extend(texts)
        return tokenize(texts, *rest)

    monkeypatch.setattr(build_data, "tokenize", recording)
    return found


def build(out: Path | None, texts: list[AnyDocument], **options: Any) -> tuple[Windows, Windows]:
    options = {"resume": "toy", **options} if out else options
    return make_windows([Texts(texts)], None, TOKENIZER, SECTION, out=out, **options)


# --- the same windows --------------------------------------------------------------------------


def reference(texts: list[AnyDocument], seed: int) -> dict[str, list[tuple[list[int], ...]]]:
    """All training and held-out windows, made with all tokens in memory."""
    rows: dict[bytes, TokenRow] = {}
    for document in texts:
        key = order_key(seed, group_hash(document), content_hash(document))
        ((rows[key],),) = tokenize([document], TOKENIZER)
    sides: dict[str, list[TokenRow]] = {"heldout": [], "train": []}
    held = 0
    for _, row in sorted(rows.items()):
        room = SECTION.heldout_tokens - held
        held += len(row.ids)
        if room > 0 and row.splittable:
            row = TokenRow(row.ids[:room], row.supervised[:room], True)
        sides["heldout" if room > 0 else "train"].append(row)
    windows: dict[str, list[tuple[list[int], ...]]] = {}
    for side, some in sides.items():
        plan = plan_isolated([len(r.ids) for r in some], [r.splittable for r in some], CONTEXT)

        def read(segment: Any, some: list[TokenRow] = some) -> Any:
            row, part = some[segment.row], slice(segment.start, segment.start + segment.length)
            return row.ids[part], row.supervised[part]

        shuffled = [plan[n] for n in np.random.default_rng(seed).permutation(len(plan))]
        windows[side] = [
            (w["input_ids"].tolist(), w["labels"].tolist(), w["position_ids"].tolist())
            for w in fill_windows(shuffled, read, CONTEXT, TOKENIZER.pad_token_id)
        ]
    return windows


@pytest.mark.parametrize("seed", [0, 5])
def test_windows_match_those_made_in_memory(seed: int, tmp_path: Path) -> None:
    texts = documents(120)
    expected = reference(texts, seed)
    for out in (None, tmp_path):
        train, heldout = build(out, texts, seed=seed)
        for windows, side in ((train, "train"), (heldout, "heldout")):
            arrays = (getattr(windows, f"{name}_RL").tolist() for name in ARRAYS)
            assert list(zip(*arrays, strict=True)) == expected[side]
    assert train.info.duplicates_dropped == 4


def test_a_build_that_cannot_resume_leaves_only_windows_in_its_folder(tmp_path: Path) -> None:
    texts = [f"line {n} about the fox" for n in range(100)]
    Data.build(texts, TOKENIZER, folder=tmp_path, heldout_tokens=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout", "train"]


@pytest.mark.run
def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        texts = (Document(f"{n} " + "about the fox " * 500) for n in range(count))
        section = WindowsRecipe(context=256, heldout_tokens=300)
        tracemalloc.start()
        train, _ = make_windows([Texts(texts)], None, TOKENIZER, section, out=tmp_path / str(count))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert train.info.tokens > (count - 1) * 1500
        return highest

    peak(20)  # what is allocated only once
    few, many = peak(30), peak(150)
    assert many - few < 120 * 1500 / 3  # less than a third of a byte for each further token


# --- resuming a killed build ---------------------------------------------------------------------


def test_a_killed_build_loses_at_most_a_batch(tmp_path: Path, tokenized: list[AnyDocument]) -> None:
    texts = documents(200)
    expected = build(tmp_path / "whole", texts)
    tokenized.clear()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", [*texts[:135], Document("KILL")])
    assert tokenized == without_duplicates(texts[:130])
    tokenized.clear()
    found = build(tmp_path / "out", texts)
    assert all(map(same, found, expected))
    assert tokenized == without_duplicates(texts)[len(without_duplicates(texts[:130])) :]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("damage", ["cut off", "another byte", "zeros"])
def test_damage_to_the_token_log_does_not_change_the_windows(
    share: float, damage: str, tmp_path: Path
) -> None:
    texts = documents(60)
    expected = build(None, texts)
    build(tmp_path, texts)
    file = tmp_path / TOKENIZED / "train"
    raw = file.read_bytes()
    at = round(share * (len(raw) - 1))
    match damage:
        case "cut off":
            file.write_bytes(raw[:at])
        case "another byte":
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        case "zeros":
            file.write_bytes(raw[:at] + bytes(len(raw) - at))
    assert all(map(same, build(tmp_path, texts), expected))
    assert all(map(same, build(tmp_path, texts), expected))  # the file has been repaired


def test_documents_before_a_changed_one_are_not_tokenized_again(
    tmp_path: Path, tokenized: list[AnyDocument]
) -> None:
    texts = documents(100)
    build(tmp_path, texts)
    texts[72] = Document("another text about the fox")
    tokenized.clear()
    found = build(tmp_path, texts)
    assert tokenized == [d for d in without_duplicates(texts) if d not in texts[:70]]
    assert all(map(same, found, build(None, texts)))


@pytest.mark.parametrize(
    "change",
    [
        lambda section: (section, "another tokenizer"),
        lambda section: (section.model_copy(update={"control_tokens": "tokens"}), "toy"),
    ],
)
def test_tokens_of_another_tokenizer_or_setting_are_not_reused(
    change: Callable[[WindowsRecipe], tuple[WindowsRecipe, str]],
    tmp_path: Path,
    tokenized: list[AnyDocument],
) -> None:
    texts = documents(50)
    build(tmp_path, texts)
    section, resume = change(SECTION)
    tokenized.clear()
    make_windows([Texts(texts)], None, TOKENIZER, section, out=tmp_path, resume=resume)
    assert tokenized == without_duplicates(texts)


def test_another_context_or_seed_reuses_the_tokens(
    tmp_path: Path, tokenized: list[AnyDocument]
) -> None:
    texts = documents(50)
    build(tmp_path, texts)
    tokenized.clear()
    section = SECTION.model_copy(update={"context": 128})
    found = make_windows(
        [Texts(texts)], None, TOKENIZER, section, seed=2, out=tmp_path, resume="toy"
    )
    assert not tokenized
    expected = make_windows([Texts(texts)], None, TOKENIZER, section, seed=2)
    assert all(map(same, found, expected))


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1)))
@settings(deadline=None)
def test_tokens_are_read_as_they_were_written(rows: list[list[tuple[int, bool]]]) -> None:
    log = TokenLog(io.BytesIO())
    made = [
        TokenRow(np.array([i for i, _ in row], np.int32), np.array([s for _, s in row]), False)
        for row in rows
    ]
    found = log.append("documents", [[row] for row in made])
    for row, (logged,) in zip(made, found, strict=True):
        assert (logged.tokens, logged.splittable) == (len(row.ids), False)
        for first in (0, logged.tokens // 2):
            ids, supervised = log.read(logged.start, first, logged.tokens - first)
            assert ids.tolist() == row.ids[first:].tolist()
            assert supervised.tolist() == row.supervised[first:].tolist()


def test_hashes_are_truncated_to_the_length_of_the_records() -> None:
    assert len(order_key(0, b"g" * 32, b"e" * 32)) == 2 * HASH


# --- in a run ------------------------------------------------------------------------------------


def rows_of_a_run(folder: Path, count: int) -> list[dict[str, Any]]:
    tiny.save_model(folder / "teacher")
    return [{"text": f"line {n} about the fox number {n * n}"} for n in range(count)]


def recipe(folder: Path, **data: Any) -> Path:
    source = {"kind": "jsonl", "path": "texts.jsonl"}
    raw = tiny.recipe(
        folder,
        teacher={"model": "./teacher"},
        data={"sources": [source], "context": 64, "heldout_tokens": 300, **data},
        folder=str(folder / "run"),
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_after_a_row_is_corrected_earlier_batches_are_not_tokenized_again(
    tmp_path: Path, tokenized: list[AnyDocument]
) -> None:
    rows = rows_of_a_run(tmp_path, 100)
    bad = [*rows[:67], {"text": "half of a pair: \ud800"}, *rows[67:]]
    write_jsonl(tmp_path / "texts.jsonl", bad)
    with pytest.raises(DataError, match="surrogate") as error:
        prepare_data(recipe(tmp_path))
    assert error.value.where == f"{tmp_path / 'texts.jsonl'}:68"

    tokenized.clear()
    write_jsonl(tmp_path / "texts.jsonl", rows)
    _, train, heldout = prepare_data(recipe(tmp_path))
    assert tokenized == [Document(row["text"]) for row in rows[60:]]
    assert train.path is not None
    assert not list(train.path.parent.parent.rglob(TOKENIZED))
    shutil.rmtree(tmp_path / "run")
    _, *expected = prepare_data(recipe(tmp_path))
    assert all(map(same, (train, heldout), expected))
