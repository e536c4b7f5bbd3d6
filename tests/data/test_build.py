"""The complete data stage: from a recipe section to windows on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from stillhouse.data.batches import collate
from stillhouse.data.build_data import build
from stillhouse.data.data_config import DataRecipe
from stillhouse.data.preview import CONTEXT, SUPERVISED, preview
from stillhouse.data.windows import Windows, open_windows
from stillhouse.errors import DataError

from .toys import byte_level, chat, write_jsonl

TOKENIZER = byte_level()


def recipe(**values: Any) -> DataRecipe:
    defaults = {
        "sources": [{"kind": "text", "path": "a.txt", "documents": "line"}],
        "context": 64,
        "heldout_tokens": 200,
    }
    return DataRecipe.model_validate(defaults | values)


def build_in(
    folder: Path, seed: int = 0, out: str = "out", tokenizer: Any = TOKENIZER, **values: Any
) -> tuple[Windows, Windows, Any]:
    """The windows as opened from disk, and the summaries of both that `build` returned."""
    made = build(recipe(**values), tokenizer, seed=seed, base=folder, out=folder / out)
    summary = SimpleNamespace(train=made[0].info, heldout=made[1].info)
    return open_windows(folder / out / "train"), open_windows(folder / out / "heldout"), summary


def lines(count: int, start: int = 0) -> list[str]:
    return [f"line {n} about the fox number {n * n}" for n in range(start, start + count)]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts) + "\n")


def documents(windows: Windows) -> list[str]:
    """The texts in the windows, split where positions restart; padding is left out."""
    found = []
    for ids_L, positions_L in zip(windows.input_ids_RL, windows.position_ids_RL, strict=True):
        for part in np.split(ids_L, np.flatnonzero(positions_L == 0)[1:]):
            text = TOKENIZER.decode(part).replace("<|im_end|>", "")
            if text:
                found.append(text)
    return found


def test_windows_contain_the_text_and_its_counts_are_correct(tmp_path: Path) -> None:
    texts = lines(100)
    write_lines(tmp_path / "a.txt", texts)
    train, heldout, summary = build_in(tmp_path, packing="none")
    assert set(documents(train)) < set(texts)
    assert len(set(documents(heldout)) - set(texts)) <= 1  # the last one may be cut short
    assert len(set(documents(train)) | set(documents(heldout))) >= 99
    assert not set(documents(train)) & set(documents(heldout))
    for windows, info in ((train, summary.train), (heldout, summary.heldout)):
        assert windows.info == info
        labels_RL = torch.stack([windows[n]["labels"] for n in range(len(windows))])
        assert int((labels_RL != -100).sum()) == info.supervised_tokens
        # Each document's first token is not predicted; all others are.
        assert info.supervised_tokens == info.tokens - info.documents
        assert info.fill == info.tokens / labels_RL.numel()
    assert summary.heldout.tokens == 200


def test_packing_fills_windows(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(300))
    alone = build_in(tmp_path, packing="none")[2].train
    packed = build_in(tmp_path, packing="isolated")[2].train
    assert packed.tokens == alone.tokens
    assert packed.fill > 0.95 > alone.fill


def test_train_tokens_is_met_exactly(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(300))
    train, _, summary = build_in(tmp_path, train_tokens=777)
    assert summary.train.tokens == 777
    real_RL = train.labels_RL != -100
    assert int(real_RL.sum()) == summary.train.supervised_tokens


def test_windows_do_not_depend_on_the_order_of_documents(tmp_path: Path) -> None:
    texts = lines(200)
    write_lines(tmp_path / "a.txt", texts)
    write_lines(tmp_path / "b.txt", texts[::-1] + texts[:5])
    sources = [{"kind": "text", "path": "b.txt", "documents": "line"}]
    for limit in (None, 500):
        first = build_in(tmp_path, out="a", train_tokens=limit)
        second = build_in(tmp_path, out="b", train_tokens=limit, sources=sources)
        for one, two in zip(first[:2], second[:2], strict=True):
            np.testing.assert_array_equal(one.input_ids_RL, two.input_ids_RL)
            np.testing.assert_array_equal(one.labels_RL, two.labels_RL)
        assert second[2].train.duplicates_dropped == 5


def test_another_seed_gives_other_windows(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(200))
    first, _, _ = build_in(tmp_path, seed=0, out="a", train_tokens=500)
    second, _, _ = build_in(tmp_path, seed=1, out="b", train_tokens=500)
    assert set(documents(first)) != set(documents(second))


def test_heldout_sources_are_removed_from_training(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", [f"\t{text}" for text in lines(60)])
    write_lines(tmp_path / "b.txt", ["  " + text.replace(" ", "  ") for text in lines(20, 50)])
    train, heldout, summary = build_in(
        tmp_path,
        heldout_sources=[{"kind": "text", "path": "b.txt", "documents": "line"}],
        packing="none",
    )
    assert sorted(text.strip() for text in documents(train)) == sorted(lines(50))
    assert summary.train.overlap_removed == 10
    assert summary.heldout.tokens == 200
    assert heldout.info.duplicates_dropped == 0


def test_chats_and_text_share_windows(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(100))
    write_jsonl(
        tmp_path / "c.jsonl", [{"messages": chat(f"what is {n}", "it is")} for n in range(50)]
    )
    sources = [
        {"kind": "text", "path": "a.txt", "documents": "line"},
        {"kind": "jsonl", "path": "c.jsonl"},
    ]
    train, _, _ = build_in(tmp_path, sources=sources)
    (start,) = TOKENIZER.convert_tokens_to_ids(["<|im_start|>"])
    assert not (train.labels_RL == start).any()
    assert (train.input_ids_RL == start).any()
    assert train.info.fill > 0.9


# --- chats that do not fit -------------------------------------------------------------------


def long_chats(folder: Path) -> dict[str, Any]:
    rows = [{"messages": chat(f"what is {n}", "it is " * (60 if n == 3 else 2))} for n in range(40)]
    write_jsonl(folder / "c.jsonl", rows)
    return {"sources": [{"kind": "jsonl", "path": "c.jsonl"}], "heldout_tokens": 100}


def test_a_long_chat_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than the context of 64") as error:
        build_in(tmp_path, **long_chats(tmp_path))
    assert error.value.where == f"{tmp_path / 'c.jsonl'}:4"
    assert "truncate or drop" in str(error.value.fix)


@pytest.mark.parametrize("choice", ["truncate", "drop"])
def test_long_chats_are_truncated_or_dropped_and_counted(choice: str, tmp_path: Path) -> None:
    _, _, summary = build_in(tmp_path, **long_chats(tmp_path), long_rows=choice)
    assert summary.train.rows_truncated == (choice == "truncate")
    assert summary.train.rows_dropped == (choice == "drop")
    assert summary.train.documents + summary.heldout.documents == 40 - (choice == "drop")


def test_a_chat_as_long_as_the_context_fits(tmp_path: Path) -> None:
    rows = [{"messages": chat("what is it", "x " * n)} for n in range(1, 21)]
    write_jsonl(tmp_path / "c.jsonl", rows)
    longest = TOKENIZER.apply_chat_template(rows[-1]["messages"], return_dict=True)
    values: dict[str, Any] = {
        "sources": [{"kind": "jsonl", "path": "c.jsonl"}],
        "heldout_tokens": 100,
    }
    context = len(longest["input_ids"])
    assert build_in(tmp_path, **values, context=context)[2].train.rows_truncated == 0
    with pytest.raises(DataError, match=f"has {context} tokens"):
        build_in(tmp_path, **values, context=context - 1)


def test_a_truncated_chat_without_supervised_tokens_is_dropped(tmp_path: Path) -> None:
    rows = [{"messages": chat(f"what {n} " * (60 if n == 3 else 1), "it is")} for n in range(40)]
    write_jsonl(tmp_path / "c.jsonl", rows)
    sources = [{"kind": "jsonl", "path": "c.jsonl"}]
    _, _, summary = build_in(tmp_path, sources=sources, heldout_tokens=100, long_rows="truncate")
    assert (summary.train.rows_truncated, summary.train.rows_dropped) == (0, 1)


# --- errors ----------------------------------------------------------------------------------


def test_the_error_says_why_no_training_text_is_left(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"messages": chat("what", "it is " * 60)}])
    with pytest.raises(DataError, match="1 rows are longer than the context of 64") as long:
        build_in(tmp_path, sources=[{"kind": "jsonl", "path": "c.jsonl"}], long_rows="drop")
    assert long.value.fix == "raise data.context"
    write_lines(tmp_path / "a.txt", lines(20))
    same = [{"kind": "text", "path": "a.txt", "documents": "line"}]
    with pytest.raises(DataError, match="20 documents are also in the held-out text") as shared:
        build_in(tmp_path, heldout_sources=same)
    assert shared.value.fix == "use held-out text that is different from the training text"


def test_a_file_read_as_one_document_is_rejected_with_a_fix(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(100))
    with pytest.raises(DataError, match="one document has") as error:
        build_in(tmp_path, sources=[{"kind": "text", "path": "a.txt"}])
    assert "documents: blank-line" in str(error.value.fix)


def test_data_without_supervised_tokens_is_rejected(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(100))
    with pytest.raises(DataError, match="None of the 1 tokens is supervised"):
        build_in(tmp_path, train_tokens=1)


def test_a_damaged_folder_is_rejected(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(100))
    build_in(tmp_path)
    path = tmp_path / "out" / "train"
    labels, about = path / "labels.npy", path / "windows.json"
    whole, description = labels.read_bytes(), about.read_text()
    for damage in (whole[:-100], whole[:20], b"", b"\x80\x04pickle"):
        labels.write_bytes(damage)
        with pytest.raises(DataError, match="truncated") as error:
            open_windows(path)
        assert error.value.where == str(labels)
    labels.unlink()
    with pytest.raises(DataError, match="missing"):
        open_windows(path)
    np.save(labels, np.zeros((2, 3), dtype=np.int32))
    with pytest.raises(DataError, match=r"int32 \[2, 3\], but windows.json states int32"):
        open_windows(path)
    labels.write_bytes(whole)
    for damage_text, what in ((description[:30], "damaged"), ("{}", "another version")):
        about.write_text(damage_text)
        with pytest.raises(DataError, match=what):
            open_windows(path)
    about.unlink()
    with pytest.raises(DataError, match="not a folder of windows"):
        open_windows(path)


# --- windows in a data loader and in the preview ---------------------------------------------


def test_windows_feed_a_data_loader(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(100))
    train, _, _ = build_in(tmp_path)
    assert train.context == 64
    assert train.supervised_tokens == json.loads(
        (tmp_path / "out" / "train" / "windows.json").read_text()
    )["supervised_tokens"]  # fmt: skip
    rows: Any = train  # not a torch Dataset, but it has the methods that a loader needs
    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=collate)
    batch = next(iter(loader))
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == (3, 64)
    np.testing.assert_array_equal(batch["labels"].numpy(), train.labels_RL[:3])


def test_preview_shows_which_tokens_are_supervised(tmp_path: Path) -> None:
    rows = [{"messages": chat(f"[red]what[/red] {n}", f"it is {n}🦊")} for n in range(40)]
    write_jsonl(tmp_path / "c.jsonl", rows)
    sources = [{"kind": "jsonl", "path": "c.jsonl"}]
    train, _, _ = build_in(tmp_path, sources=sources, heldout_tokens=100, context=128)
    console = Console(width=200, record=True, file=(tmp_path / "screen").open("w"))
    console.print(preview(train, TOKENIZER, 1))
    shown = console.export_text(clear=False)
    first = train[0]
    supervised = int((first["labels"] != -100).sum())
    assert f"{supervised} supervised" in shown
    assert "[red]what[/red]" in shown
    assert "padding" in shown
    assert shown.count("<|im_start|>assistant") == int(shown.split("window 0: ")[1].split()[0])
    # Exactly the supervised tokens have the color of supervised text.
    by_style: dict[str, str] = {SUPERVISED: "", CONTEXT: ""}
    for segment in console.render(preview(train, TOKENIZER, 1)):
        by_style[str(segment.style)] = by_style.get(str(segment.style), "") + segment.text
    labels, ids = first["labels"], first["input_ids"]
    answers = TOKENIZER.decode(ids[labels != -100])
    assert "🦊<|im_end|>" in answers
    assert "".join(by_style[SUPERVISED].split()) == "supervised" + "".join(answers.split())
    assert "it is" not in by_style[CONTEXT]


def test_preview_marks_each_document_and_counts_padding(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(100))
    train, _, _ = build_in(tmp_path, packing="none")
    console = Console(width=200, record=True, file=(tmp_path / "screen").open("w"))
    console.print(preview(train, TOKENIZER, 2))
    shown = console.export_text()
    assert shown.count("[1] ") == 2
    assert "window 1: 1 document" in shown
    for row in range(2):
        padding = 64 - int((train[row]["labels"] != -100).sum()) - 1
        assert f"{padding} × padding" in shown


def test_preview_shows_formats_and_notes_and_marks_supervised_text_without_colors(
    tmp_path: Path,
) -> None:
    rows: list[Any] = [{"messages": chat(f"what {n}", f"it is {n}"), "id": n} for n in range(40)]
    rows += [
        {"messages": [*chat(f"w {n}"), {**chat("", f"no {n}")[1], "weight": 0}, *chat("q", "yes")]}
        for n in range(20)
    ]
    rows += [{"instruction": f"Name {n}", "input": "", "output": f"it is {n}"} for n in range(20)]
    write_jsonl(tmp_path / "c.jsonl", rows)
    sources = [{"kind": "jsonl", "path": "c.jsonl"}]
    train, _, summary = build_in(tmp_path, sources=sources, heldout_tokens=100, context=128)
    assert summary.train.formats == {"messages": 60, "Alpaca": 20}
    assert summary.train.notes == {"not read: `id`": 40}
    console = Console(width=200, record=True, file=(tmp_path / "screen").open("w"))
    console.print(preview(train, TOKENIZER, len(train)))
    shown = console.export_text()
    assert "rows read: 60 messages, 20 Alpaca" in shown
    assert "40 rows: not read: `id`" in shown
    assert "⟦yes<|im_end|>⟧" in shown
    assert "⟦no" not in shown
    assert "\nno 7<|im_end|>" in shown


def test_a_source_with_a_token_limit_provides_about_that_many(tmp_path: Path) -> None:
    """The documents are drawn from the whole source, not only from its beginning."""
    write_lines(tmp_path / "a.txt", lines(400))
    write_lines(tmp_path / "b.txt", [text.replace("fox", "owl") for text in lines(20)])
    sources: list[dict[str, Any]] = [
        {"kind": "text", "path": "b.txt", "documents": "line"},
        {"kind": "text", "path": "a.txt", "documents": "line", "tokens": 1000},
    ]
    train, heldout, _ = build_in(tmp_path, sources=sources, packing="none")
    found = documents(train) + documents(heldout)
    foxes = [text for text in found if "fox" in text]
    assert sum("owl" in text for text in found) >= 19  # the last held-out one may be cut short
    assert 900 < sum(len(TOKENIZER(text)["input_ids"]) for text in foxes) < 1100
    numbers = [int(text.split()[1]) for text in foxes if len(text.split()) > 2]
    assert min(numbers) < 100
    assert max(numbers) > 300
    assert any("owl" in text for text in documents(heldout))


def test_a_limited_source_leaves_the_rest_of_its_documents_to_the_others(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(200))
    part: dict[str, Any] = {"kind": "text", "path": "a.txt", "documents": "line", "tokens": 500}
    rest = {name: value for name, value in part.items() if name != "tokens"}
    for sources in ([part, rest], [part, part, rest]):
        _, _, summary = build_in(tmp_path, sources=sources)
        assert summary.train.documents + summary.heldout.documents == 200
        assert 0 < summary.train.duplicates_dropped < 200


def test_a_source_of_held_out_text_may_have_a_token_limit(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", lines(50))
    write_lines(tmp_path / "b.txt", [text.replace("fox", "owl") for text in lines(200)])
    held = [{"kind": "text", "path": "b.txt", "documents": "line", "tokens": 300}]
    section: dict[str, Any] = {"heldout_sources": held, "heldout_tokens": 5000, "packing": "none"}
    _, heldout, summary = build_in(tmp_path, **section)
    assert 300 <= summary.heldout.tokens < 350
    assert all("owl" in text for text in documents(heldout)[:-1])
