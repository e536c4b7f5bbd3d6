"""Which tokens of a chat are supervised."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stillhouse.data.control_tokens import Piece
from stillhouse.data.documents import Completion, Conversation, Document
from stillhouse.data.tokenize_rows import TokenRow, encode_pieces, tokenize
from stillhouse.errors import DataError

from .toys import (
    CHATML,
    FORCES_REASONING,
    FORGETS_REASONING,
    INSTRUCT,
    STRICT,
    WITH_BOS,
    byte_level,
    chat,
    metaspace,
)

words = st.text(alphabet="abc thé\n 語🦊", min_size=1, max_size=20).filter(str.strip)


def conversation(messages: list[dict[str, str]], **more: Any) -> Conversation:
    return Conversation(tuple(messages), where="chats.jsonl:7", **more)


def rows_of(document: Any, tokenizer: Any) -> list[TokenRow]:
    return tokenize([document], tokenizer)[0]


def learned(row: TokenRow, tokenizer: Any) -> list[str]:
    """The text of every run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for token, supervised in zip(row.ids.tolist(), row.supervised.tolist(), strict=True):
        if supervised:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def chatml_mask(ids: list[int], tokenizer: Any) -> list[bool]:
    """The slow reference: reads ChatML one token at a time, without the template."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    mask: list[bool] = []
    header: list[int] | None = None
    inside = False
    for token in ids:
        mask.append(inside)
        if token == start:
            header, inside = [], False
        elif token == end:
            header, inside = None, False
        elif header is not None:
            header.append(token)
            if tokenizer.decode(header) == "assistant\n":
                header, inside = None, True
    return mask


@given(
    system=st.none() | words,
    turns=st.lists(words, min_size=2, max_size=7),
)
@settings(max_examples=60, deadline=None)
def test_the_loss_mask_matches_a_token_by_token_reference(
    system: str | None, turns: list[str]
) -> None:
    tokenizer = byte_level()
    messages = chat(*turns)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    (row,) = rows_of(conversation(messages), tokenizer)
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    whole = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
    assert tokenizer.decode(row.ids) == whole
    assert row.supervised.tolist() == chatml_mask(row.ids.tolist(), tokenizer)


def test_the_end_of_turn_is_supervised_even_if_it_is_the_padding_token() -> None:
    tokenizer = byte_level()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = rows_of(conversation(chat("what is it", "rain", "and then", "wind")), tokenizer)
    assert learned(row, tokenizer) == ["rain<|im_end|>", "wind<|im_end|>"]


def test_bos_is_not_added_if_the_template_writes_it() -> None:
    tokenizer = byte_level(WITH_BOS, bos=True)
    (row,) = rows_of(conversation(chat("what", "rain")), tokenizer)
    assert row.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert row.ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [INSTRUCT, INSTRUCT.replace("%} {{", "%}{{")])
def test_a_tokenizer_that_prefixes_a_space_adds_none_between_turns(template: str) -> None:
    tokenizer = metaspace(template)
    messages = chat("what is it", "the fox", "and", "the dog")
    (row,) = rows_of(conversation(messages), tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row.ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [text.split() for text in learned(row, tokenizer)] == [
        ["the", "fox", "</s>"],
        ["the", "dog", "</s>"],
    ]


def test_a_token_across_a_boundary_belongs_to_the_side_where_it_begins() -> None:
    tokenizer = metaspace()
    (the,) = tokenizer("the", add_special_tokens=False)["input_ids"]
    pieces = [Piece("th", False), Piece("e fox", True), Piece(" an", False), Piece("d", True)]
    ((ids, mask),) = encode_pieces([pieces], tokenizer)
    assert ids.tolist() == tokenizer("the fox and", add_special_tokens=False)["input_ids"]
    assert ids[0] == the
    (and_,) = tokenizer("and", add_special_tokens=False)["input_ids"]
    assert ids[-1] == and_
    assert mask.tolist() == [False, *[True] * (len(ids) - 2), False]


def test_a_token_across_a_boundary_is_context_even_if_the_tokens_before_it_differ() -> None:
    """Alone, the context ends with the token `b_`; in the row, `_` is part of the token `__`."""
    vocabulary = {token: number for number, token in enumerate(["▁", "a", "b", "b▁", "▁▁"])}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "▁"), ("b", "▁")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ((ids, mask),) = encode_pieces([[Piece("ab ", False), Piece(" a", True)]], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["▁", "a", "b", "▁▁", "a"]
    assert mask.tolist() == [False, False, False, False, True]


def test_the_turns_of_a_long_chat_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    encode = PreTrainedTokenizerFast.__call__

    def counting(self: Any, text: Any, *given: Any, **options: Any) -> Any:
        read.append(len("".join(text)))
        return encode(self, text, *given, **options)

    tokenizer = metaspace()
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    messages = chat(*["the fox and the dog"] * 100)
    (row,) = rows_of(conversation(messages), tokenizer)
    assert len(learned(row, tokenizer)) == 50
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert len(whole) <= sum(read) < 1.5 * len(whole)


def test_each_answer_gets_its_own_row_if_the_template_rewrites_earlier_turns() -> None:
    tokenizer = byte_level(FORGETS_REASONING)
    messages = chat("one", "so</think>first", "two", "hm</think>second")
    rows = rows_of(conversation(messages), tokenizer)
    assert [learned(row, tokenizer) for row in rows] == [
        ["so</think>first<|im_end|>"],
        ["hm</think>second<|im_end|>"],
    ]
    assert "so</think>" not in tokenizer.decode(rows[1].ids)


def test_only_the_completion_of_messages_is_supervised() -> None:
    tokenizer = byte_level()
    messages = chat("one", "first", "two", "second")
    (row,) = rows_of(conversation(messages, supervised_from=3), tokenizer)
    assert learned(row, tokenizer) == ["second<|im_end|>"]


@pytest.mark.parametrize("bos", [False, True])
def test_only_the_completion_of_strings_and_eos_are_supervised(bos: bool) -> None:
    tokenizer = byte_level(None, bos=bos)
    (row,) = rows_of(Completion("the quick", " brown fox"), tokenizer)
    assert tokenizer.decode(row.ids) == "<s>" * bos + "the quick brown fox<|im_end|>"
    assert learned(row, tokenizer) == [" brown fox<|im_end|>"]


@pytest.mark.parametrize("bos", [False, True])
def test_all_of_a_plain_text_and_its_eos_are_supervised(bos: bool) -> None:
    tokenizer = byte_level(None, bos=bos)
    (row,) = rows_of(Document("the lazy dog"), tokenizer)
    assert tokenizer.decode(row.ids) == "<s>" * bos + "the lazy dog<|im_end|>"
    assert row.supervised.all()
    assert row.splittable


def test_tools_reach_the_template() -> None:
    tokenizer = byte_level("{% for t in tools %}{{ t['name'] }}{% endfor %}" + CHATML)
    (row,) = rows_of(conversation(chat("hi", "ok"), tools=({"name": "rain"},)), tokenizer)
    assert tokenizer.decode(row.ids).startswith("rain<|im_start|>user")


@pytest.mark.parametrize(
    ("template", "messages", "what", "fix"),
    [
        (None, chat("a", "b"), "has no chat template", "chat_template.jinja"),
        (CHATML, chat("a"), "0% of its tokens", "check its roles"),
        (CHATML, [{"role": "assistant", "content": "a"}], "0% of its tokens", "first message"),
        (FORCES_REASONING, chat("a", "b"), "own generation prompt", "add_generation_prompt"),
        (
            CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ loop.last and 'x' * 99 or '' }}"),
            chat("b", "c"),
            "(message 1: the input has ...'<|im_start|>userxxxx",
            "add_generation_prompt",
        ),
        (
            CHATML.replace("in messages", "in messages[:1]"),
            chat("b", "c"),
            "leaves out message 1 (assistant): the rendered chat ends ...'<|im_start|>user\\nb",
            "renders all assistant turns",
        ),
        (
            STRICT,
            [{"role": "system", "content": "a"}, *chat("b", "c")],
            "rejects the row: user first (roles: system, user, assistant)",
            "in the order and with the fields",
        ),
        (
            CHATML.replace("m['content']", "m['content'] + 1"),
            chat("b", "c"),
            "rejects the row: can only concatenate str",
            "in the order and with the fields",
        ),
    ],
)
def test_chats_that_cannot_be_masked_are_rejected_with_the_reason(
    template: str | None, messages: Any, what: str, fix: str
) -> None:
    with pytest.raises(DataError) as error:
        rows_of(conversation(messages), byte_level(template))
    assert what in error.value.what
    assert error.value.where == "chats.jsonl:7"
    assert fix in str(error.value.fix)


def test_a_tokenizer_without_eos_is_rejected() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        rows_of(Document("text"), tokenizer)


def test_the_error_names_two_consecutive_assistant_turns_as_the_cause() -> None:
    """Qwen 3's template writes empty reasoning in the last turn only."""
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m['content'] }}",
    ).replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    messages = [*chat("a", "b"), {"role": "assistant", "content": "c"}]
    with pytest.raises(DataError, match="right after another one") as error:
        rows_of(conversation(messages), byte_level(template))
    assert "join the two" in str(error.value.fix)
    assert rows_of(conversation(chat("a", "b", "c", "d")), byte_level(template))


def test_a_template_with_a_syntax_error_is_reported_as_damaged() -> None:
    with pytest.raises(DataError, match="chat template is damaged") as error:
        rows_of(conversation(chat("a", "b")), byte_level("{% for m in messages %}"))
    assert "chat_template.jinja" in str(error.value.fix)
