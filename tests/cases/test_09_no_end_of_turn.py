"""If the chat template writes no token after an answer, the student still learns to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stillhouse.check import check_recipe
from stillhouse.data.turn_end import end_of_answers, turn_end
from tests import tiny
from tests.chat_toys import (
    ALPACA,
    GLM,
    GLM_SPECIAL,
    chat,
    save_model,
    shown,
    tokenizer,
    write_jsonl,
)

TURNS = chat("Hi", "Hello.", "Bye", "See you.")


def test_the_next_turns_first_token_ends_an_answer_if_the_model_stops_there(tmp_path: Path) -> None:
    """As in GLM 4: <|user|> and <|observation|> are among the model's eos_token_id."""
    words = tokenizer(GLM, eos="<|endoftext|>", special=GLM_SPECIAL)
    user, observation = words.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    words = AutoTokenizer.from_pretrained(save_model(tmp_path, words, ends=[0, user, observation]))
    assert shown(TURNS, words) == [
        "<|user|>\nHi<|assistant|>\n[[Hello.<|user|>]]\nBye<|assistant|>\n[[See you.<|user|>]]"
    ]
    called = [*chat("Rain?", "call"), {"role": "observation", "content": "no"}]
    assert shown([*called, {"role": "assistant", "content": "No."}], words) == [
        "<|user|>\nRain?<|assistant|>\n[[call<|observation|>]]\nno<|assistant|>\n[[No.<|user|>]]"
    ]
    assert end_of_answers(words) == {0, user, observation}


def test_otherwise_eos_ends_an_answer_and_stays_out_of_later_turns_context() -> None:
    """The template writes no EOS before the second question, so the model never sees one there."""
    words = tokenizer(GLM, eos="<|endoftext|>", special=GLM_SPECIAL)
    assert shown(TURNS, words) == [
        "<|user|>\nHi<|assistant|>\n[[Hello.<|endoftext|>]]",
        "<|user|>\nHi<|assistant|>\nHello.<|user|>\nBye<|assistant|>\n[[See you.<|endoftext|>]]",
    ]


def test_after_plain_text_headings_eos_replaces_the_newline() -> None:
    words = tokenizer(ALPACA, eos="<|endoftext|>", special=())
    end = turn_end(words)
    assert end is not None
    assert (end.text, end.written) == ("<|endoftext|>", False)
    assert shown(chat("Hi", "Hello.\n"), words) == [
        "### user:\nHi\n### assistant:\n[[Hello.\n<|endoftext|>]]"
    ]


@pytest.mark.run
def test_check_reports_that_a_token_is_added(tmp_path: Path) -> None:
    words = tokenizer(ALPACA, eos="<|endoftext|>", special=())
    save_model(tmp_path / "teacher", words)
    (tmp_path / "text.txt").write_text("")
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 40)
    sources = [{"kind": "file", "path": str(path)}]
    found = check_recipe(tiny.recipe(tmp_path, data={"sources": sources, "context": 128}))
    warnings = [one.text for one in found if (one.level, one.topic) == ("warning", "chat template")]
    assert warnings == [
        "it writes no token after an assistant turn, so <|endoftext|> is added to each"
    ]
