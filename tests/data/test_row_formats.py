"""Every known row format is recognized, and ambiguous rows are rejected with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stillhouse.data.documents import Conversation
from stillhouse.data.row_formats import MISSING_AS_TEXT, document_from_row
from stillhouse.errors import DataError

from .learned import call, learned, rows_of, shown, tool
from .toys import TOOLS, byte_level, chat

SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
HI = chat("Hi", "Hello")
CALL: dict[str, Any] = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [call(**CALL)]},
    {"role": "tool", "content": "none"},
    {"role": "assistant", "content": "No."},
]


def turns(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """The role of each message, and its tool calls or else its text."""
    document = document_from_row(row, "text", "rows.jsonl:3")
    assert isinstance(document, Conversation)
    return [
        (m["role"], [c["function"] for c in m.get("tool_calls", [])] or m["content"])
        for m in document.messages
    ]


def pairs(messages: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return turns({"messages": messages})


def sharegpt(*said: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": who, "value": text} for who, text in said]


READ: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "OpenAI": ({"messages": [SYSTEM, *HI], "parallel_tool_calls": False}, [SYSTEM, *HI]),
    "messages as JSON text (CSV)": ({"messages": json.dumps(HI)}, HI),
    "Cohere": (
        {"messages": [{"role": "System", "content": "Be brief."},
                      {"role": "User", "content": "Hi"}, {"role": "Chatbot", "content": "Hello"}]},
        [SYSTEM, *HI]),
    "system beside the messages": ({"system": "Be brief.", "messages": HI}, [SYSTEM, *HI]),
    "the same system twice": ({"system": "Be brief.", "messages": [SYSTEM, *HI]}, [SYSTEM, *HI]),
    "Anthropic's system parts": (
        {"system": [{"type": "text", "text": "Be brief."}], "messages": HI}, [SYSTEM, *HI]),
    "ShareGPT": (
        {"conversations": sharegpt(("human", "Hi"), ("gpt", "Hello"))}, HI),
    "ShareGPT with system": (
        {"system": "Be brief.", "conversations": sharegpt(("user", "Hi"), ("chatgpt", "Hello"))},
        [SYSTEM, *HI]),
    "ShareGPT with tools": (
        {"tools": json.dumps([tool("weather", "city")]), "conversations": sharegpt(
            ("human", "Rain?"), ("function_call", json.dumps(CALL)), ("observation", "none"),
            ("gpt", "No."))}, CALLED),
    "ShareGPT as JSON text": (
        {"conversations": json.dumps(sharegpt(("human", "Hi"), ("gpt", "Hello")))}, HI),
    "conversations with roles": ({"conversations": HI}, HI),
    "lmsys": ({"conversation": HI, "language": "English", "turn": 1}, HI),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"}, chat("Add.\n1 and 2", "3")),
    "Alpaca without input": ({"instruction": "Hi", "input": "", "output": "Hello"}, HI),
    "LLaMA-Factory's Alpaca": (
        {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be brief.",
         "history": [["a", "b"]]}, [SYSTEM, *chat("a", "b"), *HI]),
    "Dolly": (
        {"instruction": "Who?", "context": "Ann sings.", "response": "Ann", "category": "qa"},
        chat("Who?\nAnn sings.", "Ann")),
    "Axolotl's context_qa": (
        {"article": "Ann sings.", "question": "Who?", "answer": "Ann"},
        chat("Ann sings.\nWho?", "Ann")),
    "Axolotl's pygmalion": (
        {"conversations": [{"role": m["role"], "value": m["content"]} for m in HI]}, HI),
    "question and answer": ({"question": "Hi", "answer": "Hello"}, HI),
    "capitals": ({"Question": "Hi", "Answer": "Hello"}, HI),
    "SQuAD": (
        {"id": "1", "title": "t", "context": "Ann sings.", "question": "Who?",
         "answers": {"text": ["Ann"], "answer_start": [0]}}, chat("Ann sings.\nWho?", "Ann")),
    "prompt and response": ({"prompt": "Hi", "response": "Hello"}, HI),
    "instruction and response": ({"instruction": "Hi", "response": "Hello"}, HI),
    "OpenOrca": (
        {"id": "1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"},
        [SYSTEM, *HI]),
    "xLAM": (
        {"query": "Rain?", "tools": json.dumps([tool("weather", "city")]),
         "answers": json.dumps([CALL])}, CALLED[:2]),
    "ms-swift's tool calls": (
        {"tools": [tool("weather", "city")], "messages": [
            CALLED[0], {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": "none"}, CALLED[3]]}, CALLED),
    "Arrow's null keys of other rows": (
        {"text": None, "prompt": None, "completion": None, "messages": HI}, HI),
    "prompt and completion as messages": (
        {"prompt": HI[:1], "completion": HI[1:], "text": None}, HI),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_known_format_is_recognized(name: str) -> None:
    row, messages = READ[name]
    assert turns(row) == pairs(messages)


@pytest.mark.parametrize("name", READ)
def test_every_known_format_is_tokenized_like_its_messages(name: str) -> None:
    row, messages = READ[name]
    tokenizer = byte_level(TOOLS)
    expected: dict[str, Any] = {"messages": messages}
    if "tools" in row:
        expected["tools"] = [tool("weather", "city")]
    assert shown(row, tokenizer) == shown(expected, tokenizer)
    assert "<|im_end|>]]" in shown(row, tokenizer)


# --- which turns are supervised --------------------------------------------------------------

UNSUPERVISED = {
    "OpenAI, Mistral, Together": {"weight": 0},
    "as a float": {"weight": 0.0},
    "Axolotl": {"train": False},
    "Axolotl's message_field_training": {"training": False},
    "ms-swift": {"loss": False},
    "torchtune": {"masked": True},
    "Fireworks": {"trainable": False},
}
SUPERVISED = {
    "weight": {"weight": 1},
    "train": {"train": True},
    "masked": {"masked": False},
    "null": {"weight": None, "train": None},
}


@pytest.mark.parametrize("flags", UNSUPERVISED.values(), ids=UNSUPERVISED)
def test_a_turn_of_weight_0_is_context(flags: dict[str, Any]) -> None:
    messages = chat("a", "b", "c", "d")
    row = {"messages": [messages[0], {**messages[1], **flags}, *messages[2:]]}
    assert learned(row, byte_level()) == ["d<|im_end|>"]
    assert "<|im_start|>assistant\nb<|im_end|>" in shown(row, byte_level())
    named = {
        "conversations": [
            {
                "from": {"user": "human", "assistant": "gpt"}[m["role"]],
                "value": m["content"],
                **{k: v for k, v in m.items() if k not in ("role", "content")},
            }
            for m in row["messages"]
        ]
    }
    assert shown(named, byte_level()) == shown(row, byte_level())


@pytest.mark.parametrize("flags", SUPERVISED.values(), ids=SUPERVISED)
def test_a_turn_of_weight_1_is_supervised(flags: dict[str, Any]) -> None:
    messages = chat("a", "b", "c", "d")
    row = {"messages": [messages[0], {**messages[1], **flags}, *messages[2:]]}
    assert shown(row, byte_level()) == shown({"messages": messages}, byte_level())


def test_a_row_whose_turns_all_have_weight_0_is_rejected() -> None:
    messages = [HI[0], {**HI[1], "weight": 0}]
    with pytest.raises(DataError, match="0% of its tokens"):
        learned({"messages": messages}, byte_level())


# --- rejected formats ------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "TRL preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "row of preference data"),
    "preference in messages": ({"chosen": HI, "rejected": HI}, "row of preference data"),
    "OpenAI preference": (
        {"input": {"messages": HI[:1]}, "preferred_output": HI[1:], "non_preferred_output": HI[1:]},
        "row of preference data"),
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, "rated answers"),
    "steps": ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "completions"),
    "tokenized": ({"input_ids": [1, 2], "labels": [1, 2]}, "already tokenized"),
    "Axolotl's segments": ({"segments": [{"label": True, "text": "a"}]}, "already tokenized"),
    "OpenAI batch input": (
        {"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": HI[:1]}},
        "an API request"),
    "images": ({"messages": HI, "images": ["a.png"]}, "only text is supported"),
    "LLaMA-Factory's preference": (
        {"conversations": sharegpt(("human", "a"), ("gpt", "b"), ("human", "c")),
         "chosen": {"from": "gpt", "value": "d"}, "rejected": {"from": "gpt", "value": "e"}},
        "row of preference data"),
    "KTO in messages": ({"messages": HI, "label": False}, "rated answers"),
    "LLaMA-Factory's KTO": ({"messages": HI, "kto_tag": True}, "`kto_tag` states whether"),
    "OpenAI's older preference": (
        {"input": HI[:1], "preferred_completion": HI[1:], "non_preferred_completion": HI[1:]},
        "row of preference data"),
    "Argilla's preference": (
        {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
        "row of preference data"),
    "ms-swift's preference": (
        {"query": "a", "response": "b", "rejected_response": "c"}, "row of preference data"),
    "torchtune's preference": (
        {"chosen_conversations": HI, "rejected_conversations": HI}, "row of preference data"),
    "Axolotl's reflection": (
        {"instruction": "a", "input": "", "output": "b", "reflection": "c", "corrected": "d"},
        "`reflection` and `corrected`"),
    "Axolotl's revision": (
        {"instruction": "a", "answer": "b", "critiques": "c", "scores": "1", "revision": "d"},
        "`critiques` and `revision`"),
    "a system prompt beside strings": (
        {"system": "x", "prompt": "a", "completion": "b"}, "`system` belongs to a chat"),
    "tools beside strings": (
        {"tools": [tool("f")], "prompt": "a", "completion": "b"}, "`tools` belongs to a chat"),
    "MMLU": ({"question": "a", "A": "b", "B": "c", "answer": "B"}, "not clear whether to train on"),
    "a fraction as weight": ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, "must be 0 or 1"),
    "weight as text": ({"messages": [HI[0], {**HI[1], "weight": "0"}]}, "must be 0 or 1"),
    "contradicting flags": (
        {"messages": [HI[0], {**HI[1], "weight": 1, "train": False}]}, "contradictory loss flags"),
    "a user's turn to learn": ({"messages": [{**HI[0], "weight": 1}, HI[1]]}, "only assistant"),
    "Axolotl's train_detail": (
        {"messages": [HI[0], {**HI[1], "train_detail": [{"begin_offset": 0, "end_offset": 1,
                                                         "train": False}]}]}, "`train_detail`"),
    "ms-swift's loss_scale": ({"messages": [HI[0], {**HI[1], "loss_scale": 0.1}]}, "`loss_scale`"),
    "a weight of a part": (
        {"messages": [HI[0], {"role": "assistant", "content": [
            {"type": "text", "text": "Hello", "weight": -1}]}]}, "A part of `messages[1]`"),
    "a mask": ({"messages": HI, "loss_mask": [0, 1]}, "`loss_mask`"),
    "a masked turn": ({"messages": [HI[0], {**HI[1], "mask": 1}]}, "`mask`"),
    "a masked turn as a boolean": ({"messages": [HI[0], {**HI[1], "mask": True}]}, "`mask`"),
    "a masked row": ({"messages": HI, "mask": 1}, "`mask`"),
    "a weight of the row": ({"messages": HI, "weight": 0.3}, "`weight`"),
    "two systems": ({"system": "x", "messages": [SYSTEM, *HI]}, "has a system prompt, and"),
    "unknown from": ({"conversations": sharegpt(("human", "a"), ("alien", "b"))}, "unknown role"),
    "a call that is none": (
        {"conversations": sharegpt(("human", "a"), ("function_call", "rain"))}, "a JSON object"),
    "OpenAI's refusal": (
        {"messages": [HI[0], {"role": "assistant", "content": None, "refusal": "No."}]},
        "has its text in `refusal`"),
    "multiple choice": (
        {"question": "a", "choices": ["b", "c"], "answer": "b"}, "not clear whether to train on"),
    "solution and answer": (
        {"problem": "a", "solution": "so b", "answer": "b"}, "`answer` and `solution`"),
    "a chain of thought": (
        {"Question": "a", "Complex_CoT": "so", "Response": "b"}, "`Complex_CoT`"),
    "several answers": ({"question": "a", "answers": ["b", "c"]}, "a list of 2"),
    "an index as answer": ({"question": "a", "answer": 2}, "but it is int"),
    "an answer that the prompt begins": (
        {"prompt": [*HI[:1], {"role": "assistant", "content": "Sure,"}],
         "completion": [{"role": "assistant", "content": " here."}]}, "they are a single turn"),
    "two questions": ({"instruction": "a", "question": "b", "answer": "c"}, "`instruction` and"),
    "a message of OpenAssistant": (
        {"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter"}, "single message"),
    "an answer of OpenAssistant": (
        {"message_id": "2", "parent_id": "1", "text": "Hello", "role": "assistant"},
        "single message"),
    "a number as role": (
        {"messages": [{"role": 1, "content": "a"}, HI[1]]}, "must be a string, but it is 1"),
    "a broken history": (
        {"instruction": "a", "output": "b", "history": [["c"]]}, "pairs of strings"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_rows_are_rejected_with_the_reason(name: str) -> None:
    row, what = REFUSED[name]
    with pytest.raises(DataError) as error:
        learned(row, byte_level())
    assert what in error.value.what
    assert error.value.where == "rows.jsonl:3"
    assert error.value.fix


# --- notes -----------------------------------------------------------------------------------


def notes(row: dict[str, Any], text_key: str = "text") -> tuple[str, ...]:
    document = document_from_row(row, text_key, "rows.jsonl:3")
    assert document is not None
    return document.about.notes


def test_keys_that_are_not_read_are_noted() -> None:
    assert notes({"messages": HI}) == ()
    assert notes({"messages": HI, "id": 1, "source": "x", "score": None}) == (
        "not read: `id`, `source`",
    )
    assert notes({"text": "a", "meta": {}}) == ("not read: `meta`",)


PARTS = {
    "tool_use": {"type": "tool_use", "id": "t1", "name": "rain", "input": {"city": "Oslo"}},
    "tool_result": {"type": "tool_result", "tool_use_id": "t1", "content": "none"},
    "thinking": {"type": "thinking", "thinking": "So."},
}


@pytest.mark.parametrize(
    ("part", "instead"),
    [("tool_use", "`tool_calls`"), ("tool_result", '"role": "tool"'), ("thinking", "reasoning_c")],
)
def test_content_parts_of_other_kinds_are_rejected_with_the_key_to_use(
    part: str, instead: str
) -> None:
    """Such parts occur in Anthropic's messages."""
    messages = [HI[0], {"role": "assistant", "content": [PARTS[part]]}]
    with pytest.raises(DataError, match=f"not text: {part}") as error:
        learned({"messages": messages}, byte_level())
    assert instead in str(error.value.fix)


def test_messages_written_as_the_fix_says_are_read() -> None:
    called = call("rain", {"city": "Oslo"}, id="t1")
    turn = {"role": "assistant", "content": None, "tool_calls": [called]}
    told = {"role": "tool", "tool_call_id": "t1", "content": "none"}
    row = {"messages": [HI[0], turn, told, HI[1]], "tools": [tool("rain", "city")]}
    first, last = learned(row, byte_level(TOOLS))
    assert first.startswith('CALL rain {"city": "Oslo"}')
    assert last.startswith("Hello")
    assert "none" in shown(row, byte_level(TOOLS))


@pytest.mark.parametrize("word", ["NaN", "null", "None", " nan\n"])
def test_words_for_missing_values_are_noted(word: str) -> None:
    for row in (
        {"prompt": "a", "completion": word},
        {"instruction": "a", "input": "", "output": word},
        {"text": word},
        {"messages": [HI[0], {"role": "assistant", "content": word}]},
    ):
        assert notes(row) == (MISSING_AS_TEXT,)
    assert notes({"prompt": "a", "completion": f"{word.strip()} is none"}) == ()


def test_a_loss_mask_of_one_changes_nothing() -> None:
    assert learned({"messages": [HI[0], {**HI[1], "loss_mask": 1}]}, byte_level()) == [
        "Hello<|im_end|>"
    ]


def test_keys_that_the_chosen_text_key_leaves_unread_are_noted() -> None:
    row = {"instruction": "Name a fruit.", "input": "", "output": "Apple"}
    assert notes(row, "instruction") == ("not read: `input`, `output`",)


def test_turns_before_and_after_the_supervised_ones_are_noted() -> None:
    (row,) = rows_of({"messages": [*HI, {"role": "user", "content": "Bye"}]}, byte_level())
    assert row.notes == ("messages after the last supervised turn are left out",)
    (row,) = rows_of({"messages": [{"role": "assistant", "content": "Yes?"}, *HI]}, byte_level())
    assert row.notes == ("an assistant turn that begins a chat is context only",)


def test_a_key_that_no_template_reads_is_noted() -> None:
    messages = [{**HI[0], "name": "Bo", "mood": "good"}, HI[1]]
    (row,) = rows_of({"messages": messages}, byte_level())
    assert set(row.notes) == {
        "the chat template does not read `mood` of a message",
        "the chat template leaves out the `name` of a message (user)",
    }
    (row,) = rows_of({"messages": [HI[0], {**HI[1], "audio": {"id": "a1"}}]}, byte_level())
    assert row.notes == ("the chat template does not read `audio` of a message",)


def test_an_unknown_role_is_noted() -> None:
    said = [HI[0], {"role": "asistant", "content": "Hm."}, *HI]
    assert notes({"messages": said}) == ("turns of the role 'asistant' are context only",)


# --- how chats are stored --------------------------------------------------------------------


def test_a_chat_stored_as_one_list_for_each_key_is_the_same_chat() -> None:
    """As Hugging Face's `Sequence` of a dictionary is stored in Parquet files."""
    columns = {key: [message[key] for message in HI] for key in HI[0]}
    for key in ("messages", "conversations"):
        assert learned({key: columns}, byte_level()) == learned({key: HI}, byte_level())
    sharegpt = {"conversations": {"from": ["human", "gpt"], "value": [m["content"] for m in HI]}}
    assert learned(sharegpt, byte_level()) == learned({"messages": HI}, byte_level())


def test_spaces_around_a_role_are_ignored() -> None:
    spaced = [{**message, "role": f" {message['role'].title()} "} for message in HI]
    assert learned({"messages": spaced}, byte_level()) == learned({"messages": HI}, byte_level())


@pytest.mark.parametrize(
    "row",
    [{"messages": HI}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}],
    ids=lambda row: next(iter(row)),
)
@pytest.mark.parametrize("key", ["weight", "train", "loss_mask"])
def test_a_row_with_a_loss_weight_of_0_is_rejected(row: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError, match=f"has an unknown key `{key}`"):
        learned({**row, key: 0}, byte_level())
    assert learned({**row, key: 1}, byte_level()) == learned(row, byte_level())


def test_options_that_change_the_rendering_are_rejected() -> None:
    for key, value in (("chat_template_kwargs", {"a": 1}), ("documents", [{"text": "x"}])):
        with pytest.raises(DataError, match=f"has `{key}`"):
            learned({"messages": HI, key: value}, byte_level())
        assert learned({"messages": HI, key: None}, byte_level())


def test_a_list_in_python_syntax_is_rejected_with_a_fix() -> None:
    with pytest.raises(DataError) as error:
        learned({"messages": str(HI)}, byte_level())
    assert "json.dumps" in str(error.value.fix)
    assert learned({"messages": json.dumps(HI)}, byte_level())


# --- suggested fixes -------------------------------------------------------------------------


def test_the_fix_for_a_misnamed_completion_is_to_rename_its_key() -> None:
    row = {"prompt": "the", "generation": " end"}
    with pytest.raises(DataError) as error:
        learned(row, byte_level())
    assert error.value.fix == "rename `generation` to `completion`"
    renamed = {"prompt": row["prompt"], "completion": row["generation"]}
    assert learned(renamed, byte_level()) == [" end<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"completion": "the end"},
        {"conversations": "a text"},
        {"id": "7", "data": ["asked", "answered"]},
        {"source": "the house", "target": "das Haus"},
        {"custom_id": "1", "response": {"body": {}}},
    ],
    ids=lambda row: "-".join(row),
)
def test_a_key_that_contains_half_of_the_row_is_not_suggested(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as error:
        learned(row, byte_level())
    fix = str(error.value.fix)
    assert "rename" not in fix
    assert not fix.startswith("set text_key") or len(row) == 1
