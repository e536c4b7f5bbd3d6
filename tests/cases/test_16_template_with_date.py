"""A chat template that writes the date renders the same text every day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.check import check_recipe
from stillhouse.commands import prepare_data, record_signals
from stillhouse.data.chat_prompt import chat_ids
from stillhouse.data.chat_template import DATE, render_chat
from stillhouse.signals.store import open_store
from stillhouse.teachers.stored_teacher import lacking_tokens
from tests import tiny
from tests.chat_toys import CHATML, chat, save_model, shown, tokenizer, write_jsonl

# Llama 3.2's, Mistral Small's, and gpt-oss's templates write the date. This one also writes
# microseconds, so that two renderings would differ within a test if the clock were read.
DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}\n" + CHATML
LLAMA_3 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today Date: {{ date_string }}\n" + CHATML
)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (DATED, "2024-07-26 00:00:00.000000\n"),
        (LLAMA_3, "Today Date: 26 Jul 2024\n"),
        ("{{ strftime_now('%B %-d, %y (%a) %%') }}" + CHATML, "July 26, 24 (Fri) %"),
        ("\n{{ strftime_now('on %A') }}" + CHATML, "\non Friday"),
        ("{% macro day() %}{{ strftime_now('%j') }}{% endmacro %}{{ day() }}" + CHATML, "208"),
    ],
    ids=["Mistral Small", "Llama 3.2", "Granite", "a newline first", "in a macro"],
)
def test_chats_and_prompts_have_the_fixed_date(template: str, written: str) -> None:
    words = tokenizer(template)
    assert render_chat(words, chat("Hi")) == written + render_chat(tokenizer(), chat("Hi"))
    assert shown(chat("Hi", "Hello."), words)[0].startswith(written)
    prompt = words.decode(chat_ids(words, chat("Hi")))
    assert prompt.startswith(written)


def test_dates_are_written_as_strftime_writes_them() -> None:
    directives = [f"%{letter}" for letter in "aAbBdHIjmMpSUwWyYcxX"]
    words = tokenizer("{{ strftime_now('" + "|".join(directives) + "') }}")
    assert render_chat(words, chat("Hi")).split("|") == [DATE.strftime(one) for one in directives]


def recipe(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    save_model(folder / "teacher", tokenizer(DATED))
    (folder / "text.txt").write_text("")
    lines = tiny.text(60).splitlines()
    rows = [{"messages": chat(f"Say {n}", line)} for n, line in enumerate(lines)]
    path = write_jsonl(folder / "chat.jsonl", rows)
    data = {"sources": [{"kind": "jsonl", "path": str(path)}], "context": 128}
    return tiny.recipe(folder, name=name, folder=str(folder / "runs" / name), data=data, **sections)


@pytest.mark.run
def test_a_signal_store_from_another_day_covers_the_same_chats(tmp_path: Path) -> None:
    encoding = {"encoding": {"kind": "top_k", "k": 4}}
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump(recipe(tmp_path, "first", signals=encoding)))
    second.write_text(yaml.safe_dump(recipe(tmp_path, "second")))
    store = open_store(record_signals(first))
    _, train, _ = prepare_data(second)
    assert lacking_tokens(store, train) == 0


@pytest.mark.run
def test_check_reports_the_fixed_date(tmp_path: Path) -> None:
    found = check_recipe(recipe(tmp_path, "checked"), base=tmp_path)
    said = [one.text for one in found if one.topic == "chat template"]
    assert "it writes the date, which is set to 26 July 2024 in every run" in said
