"""Loss masks and ends of turns with the chat templates of real models; see README.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.row_formats import document_from_row
from stillhouse.data.tokenize_rows import tokenize
from tests.templates.real_models import MODELS
from tests.templates.real_templates import (
    CHATS,
    FOLDER,
    GOLDEN,
    RAIN,
    facts,
    find_template,
    model_tokenizer,
)

EXPECTED = json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_model_has_golden_values() -> None:
    assert EXPECTED.keys() == MODELS.keys()
    assert all(CHATS.keys() < found.keys() for found in EXPECTED.values())


@pytest.mark.skipif(not FOLDER, reason="STILLHOUSE_TEMPLATES names no folder")
@pytest.mark.parametrize("name", MODELS)
def test_loss_masks_and_ends_of_turns_match_the_golden_values(name: str) -> None:
    file = find_template(MODELS[name].source, Path(FOLDER))
    if file is None:
        pytest.skip(f"{FOLDER} has no {MODELS[name].source} ({name})")
    assert facts(name, file) == EXPECTED[name]


WRITES_IDS = ("Mistral v3", "Mistral tekken", "Mistral Small 3.2", "Kimi K2 Instruct", "Solar Open")
IN_RESULTS = re.compile(r'(?:"call_id": "|\[TOOL_RESULTS\]|Return of |response:begin\|>)([\w.:]+)')


@pytest.mark.skipif(not FOLDER, reason="STILLHOUSE_TEMPLATES names no folder")
@pytest.mark.parametrize("ids", [("call_9qZ0aXbTnLk3yWvUe5RdPm7s", "call_Pm7s"), (None, None)])
@pytest.mark.parametrize("name", WRITES_IDS)
def test_each_tool_call_shares_a_valid_id_with_its_result(
    name: str, ids: tuple[str | None, str | None]
) -> None:
    """The ids of the two calls are in OpenAI's form or missing; the template needs its own form."""
    file = find_template(MODELS[name].source, Path(FOLDER))
    if file is None:
        pytest.skip(f"{FOLDER} has no {MODELS[name].source} ({name})")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rain in Oslo and Rome?"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    for number, city in enumerate(("Oslo", "Rome")):
        arguments = json.dumps({"city": city})
        call = {"id": ids[number], "function": {"name": "rain", "arguments": arguments}}
        messages[2]["tool_calls"].append({"type": "function", **call})
        messages.append({"role": "tool", "tool_call_id": ids[number], "content": "no"})
    messages.append({"role": "assistant", "content": "It is dry."})
    row = {"messages": messages, "tools": [RAIN]}
    document = document_from_row(row, "text", "rows.jsonl:1")
    assert document is not None
    words = model_tokenizer(MODELS[name], file)
    text = words.decode(tokenize([document], words)[0][-1].ids.tolist())
    found = IN_RESULTS.findall(text)
    assert len({*found}) == len(found) == 2
    assert all(text.count(one) == 2 for one in found)
