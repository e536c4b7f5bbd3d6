"""Turns a row of a file or dataset into a document, or rejects it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from stillhouse.data.chat_formats import (
    as_messages,
    chat_or_text,
    is_blank,
    joined_text,
    read_chat,
    require_answer,
    require_text,
)
from stillhouse.data.chatgpt_export import FORMAT, chatgpt_messages, is_chatgpt_export
from stillhouse.data.documents import About, AnyDocument, Completion, Conversation, Document
from stillhouse.data.loss_flags import reject_weighted_row
from stillhouse.data.question_formats import is_pair, pair_texts, read_pair
from stillhouse.data.row_reader import header_hint
from stillhouse.data.words import MISSING
from stillhouse.errors import DataError, errors_at

_CHATS = ("messages", "conversations", "conversation")
"""Keys that contain a chat."""
_NAMES = ("messages", "conversations", "prompt", "completion")
"""Keys whose misspellings are reported."""
_CHAT_KEYS = ("system", "system_prompt", "tools", "functions", "parallel_tool_calls")
"""Keys that are read together with a chat. `parallel_tool_calls` does not affect the text."""
_PREFERENCES = {
    r"(chosen|preferred)(_\w+)?": "a preferred answer",
    r"(rejected|non_preferred|dispreferred)(_\w+)?": "a rejected answer",
}
"""Keys of preference data, and their meaning."""
_ASKS = ("user", "human", "system", "tool", "observation")
_OF_TREES = ("message_id", "parent_id", "message_tree_id")
"""Keys that link a row to the previous message, as in OpenAssistant's data."""
_MISSING = re.compile(rf"{MISSING}|nan|none", re.I)
"""How programs write a missing value as text."""
MISSING_AS_TEXT = "a text that is only `NaN`, `null`, `None`, or similar is read as that word"
_TOKENIZED = ("input_ids", "segments")


def document_from_row(row: Mapping[str, Any], text_key: str, where: str) -> AnyDocument | None:
    """The document in `row`, or None if its text is blank.

    Looks for a chat (including ChatGPT's export), then `prompt` with `completion`, then a question
    with its answer in any known format, then `text_key`. A `text_key` other than "text" was set by
    the user, so it comes first. Raises DataError if none is found, or if it is ambiguous what to
    train on.
    """
    with errors_at(where):
        document = _document(row, text_key)
    return document and replace(document, where=where)


def _document(row: Mapping[str, Any], text_key: str) -> AnyDocument | None:
    given = {key: value for key, value in row.items() if value is not None}
    if text_key != "text":
        if text_key not in row:
            raise _missing_key(row, text_key)
        return _plain(given, text_key)
    for key in _CHATS:
        messages = as_messages(given.get(key))
        if isinstance(messages, list) or (key == "messages" and key in given):
            _reject_judged(given, messages)
            chat = read_chat(given, key)
            sharegpt = any("from" in m for m in messages if isinstance(m, Mapping))
            about = About("ShareGPT" if sharegpt else "messages", chat.about.notes)
            return _noted(replace(chat, about=about), given, (key, *_CHAT_KEYS))
    if text_key not in given and is_chatgpt_export(given):
        return _exported(given)
    _reject_others(given)
    if "prompt" in given and "completion" in row:
        document = _completion(row)
        chat_keys = _CHAT_KEYS if isinstance(document, Conversation) else ()
        return _noted(document, given, ("prompt", "completion", *chat_keys))
    if is_pair(given) and (text_key not in given or _is_rendered(given, text_key)):
        chat, used = read_pair(given)
        return _noted(chat, given, (*used, *_CHAT_KEYS))
    if text_key in row:
        return _plain(given, text_key)
    if "messages" in row:
        return read_chat(row, "messages")
    raise _missing_key(row, text_key)


def _is_rendered(given: Mapping[str, Any], text_key: str) -> bool:
    """Whether the text of a row repeats its question and answer, as in Alpaca's files on the Hub.

    Raises DataError if it is a different text.
    """
    pair, text = pair_texts(given), given[text_key]
    if not pair or not isinstance(text, str) or is_blank(text):
        return bool(pair)
    if all(part in text for part in pair.values()):
        return True
    names = " and ".join(f"`{key}`" for key in pair)
    raise DataError(
        f"It is not clear what to train on: the row has `{text_key}`, and also {names}",
        fix=f"remove `{text_key}` to train on the answer, or remove {names} to train on the whole "
        "text",
    )


def _exported(given: Mapping[str, Any]) -> Conversation | None:
    """Read a chat from ChatGPT's export; None if no answer in it is text."""
    messages, notes = chatgpt_messages(given)
    if not messages:
        return None
    chat = read_chat({"messages": messages}, "messages")
    return replace(chat, about=About(FORMAT, (*chat.about.notes, *notes)))


def _noted(document: AnyDocument, given: Mapping[str, Any], used: Collection[str]) -> AnyDocument:
    """Add notes about keys that are not read, and about texts that seem to be missing values."""
    notes = list(document.about.notes)
    unread = sorted(str(key) for key in given if key not in used)
    if unread:
        names = ", ".join(f"`{key}`" for key in unread[:12])
        notes.append(f"not read: {names}" + (", ..." if len(unread) > 12 else ""))
    texts = [given.get(key) for key in used]
    if isinstance(document, Conversation):
        texts += [message.get("content") for message in document.messages]
    if any(isinstance(text, str) and _MISSING.fullmatch(text.strip()) for text in texts):
        notes.append(MISSING_AS_TEXT)
    if isinstance(document, Conversation):
        empty = (m["role"] for m in document.messages if is_blank(joined_text(m.get("content"))))
        blank = {*empty} - {"assistant", "tool"}
        notes += [f"a message ({role}) is empty" for role in sorted(blank)]
    about = About(document.about.format, tuple(notes))
    return replace(document, about=about) if notes else document


def _plain(given: Mapping[str, Any], key: str) -> AnyDocument | None:
    text = _text(given.get(key), key)
    return _noted(Document(text), given, (key,)) if text.strip() else None


def _completion(row: Mapping[str, Any]) -> AnyDocument:
    prompt, completion = (chat_or_text(row[key]) for key in ("prompt", "completion"))
    if isinstance(prompt, str):
        completion = row["completion"]  # the answer to a text prompt may be JSON: keep it as text
    if isinstance(prompt, list) and isinstance(completion, list):
        return read_chat(row, "prompt", completion="completion", format="prompt and completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(
            "`prompt` and `completion` must both be strings, or both be lists of messages",
            fix='write both as lists: [{"role": "user", "content": "..."}]',
        )
    for key in ("system", "system_prompt", "tools", "functions"):
        if row.get(key):
            raise DataError(
                f"`{key}` belongs to a chat, but `prompt` and `completion` are strings",
                fix="write the row as `messages`, or write the complete prompt into `prompt`",
            )
    reject_weighted_row(row)
    prompt = _text(prompt, "prompt")
    completion = require_answer(_text(completion, "completion"), "completion")
    return Completion(prompt, completion)


def _text(value: Any, key: str) -> str:
    fix = f"remove the row, write its `{key}` as a string, or set text_key to a different column"
    return require_text(value, key, fix)


# --- known unsupported rows ------------------------------------------------------------------


def _reject_judged(given: Mapping[str, Any], messages: Any) -> None:
    """Raise DataError for a chat whose answer is under a different key or is rated."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    answer = isinstance(last, Mapping) and (last.get("role", last.get("from")) not in _ASKS)
    if "kto_tag" in given or _is_rating(given.get("label")) or not answer:
        _reject_others(given)


def _is_rating(label: Any) -> bool:
    """Whether a label is a boolean, also as a number or as text (CSV)."""
    return str(label).strip().lower() in ("true", "false", "0", "1", "0.0", "1.0")


def _reject_others(given: Mapping[str, Any]) -> None:
    """Raise DataError for rows of well-known formats that do not define one text to train on."""
    for pattern, meaning in _PREFERENCES.items():
        for key in given:
            if re.fullmatch(pattern, str(key)):
                raise DataError(
                    f"This is a row of preference data: `{key}` is {meaning}, and preferences "
                    "cannot be trained on",
                    fix="keep only the preferred answer: write the chat with it as `messages`",
                )
    chat = is_pair(given) or any(key in given for key in ("completion", *_CHATS))
    if "kto_tag" in given:
        raise DataError(
            "This is a row of rated answers (KTO): `kto_tag` states whether the answer is "
            "preferred",
            fix="keep only the rows whose `kto_tag` is true, and remove that key",
        )
    if chat and _is_rating(given.get("label")):
        raise DataError(
            f"This seems to be a row of rated answers (KTO): `label` is {given['label']!r}",
            fix="if it states whether the answer is good, keep only the rows in which it is true, "
            "and remove the key; otherwise, rename the key",
        )
    if "prompt" in given and "completions" in given:
        raise DataError(
            "The row has several `completions`, which are steps or alternatives",
            fix="write one `completion` per row",
        )
    if "role" in given and any(key in given for key in _OF_TREES):
        raise DataError(
            f"The row is a single message (`role`: {str(given['role'])!r}) of a chat that other "
            "rows continue",
            fix="write each chat, from its first message to an answer, as one row with `messages`",
        )
    for key in _TOKENIZED:
        if isinstance(given.get(key), list):
            raise DataError(
                f"The row is already tokenized or split into segments (`{key}`)",
                fix="write the text itself: `messages`, or `prompt` with `completion`",
            )
    for key in ("body", "request"):
        inside = given.get(key)
        inside = inside.get("body", inside) if isinstance(inside, Mapping) else None
        if isinstance(inside, Mapping) and "messages" in inside:
            raise DataError(
                f"This is an API request (`{key}`), whose messages have no answer yet",
                fix="to have a teacher answer it, list the file in synthesize.prompts; if you have "
                "the answers, write each chat as `messages`",
            )


def _missing_key(row: Mapping[str, Any], text_key: str) -> DataError:
    keys = [str(key) for key in row]
    has = f"its keys are {', '.join(keys)}" if keys else "it is empty"
    return DataError(
        f"The row has no `{text_key}`; {has}"
        if text_key != "text"
        else "The row has no `text`, no `messages`, and no `prompt` with `completion`, and is not "
        f"in any other known format; {has}",
        fix=header_hint(keys) + _advice(row, text_key, keys),
    )


def _advice(row: Mapping[str, Any], text_key: str, keys: list[str]) -> str:
    if not keys:
        return "remove the row"
    texts = [key for key in keys if isinstance(row.get(key), str) and not is_blank(row[key])]
    slips = [key for key in keys if key not in _NAMES]
    for want in dict.fromkeys([text_key, *_NAMES]):
        fitting = [key for key in slips if (key in texts) != (want in _CHATS)]
        near = [] if want in row else difflib.get_close_matches(want, fitting, 1, cutoff=0.75)
        if near and want == text_key and near[0] in texts:
            return f"set text_key: {near[0]}, or rename the key"
        if near:
            return f"rename `{near[0]}` to `{want}`"
    given = [key for key in ("prompt", "completion") if row.get(key) is not None]
    if given:
        has, lacks = given[0], "completion" if given[0] == "prompt" else "prompt"
        others = [key for key in texts if key != has]
        rename = f"rename `{others[0]}` to `{lacks}`" if len(others) == 1 else ""
        return rename or "write both `prompt` and `completion`"
    parts = [key for key in keys if isinstance(row.get(key), (list, Mapping)) and row[key]]
    if not texts or parts:
        return "write the row as `text`, as `messages`, or as `prompt` with `completion`"
    longest = max(texts, key=lambda key: len(row[key]))
    if len(texts) == 1:
        return f"set text_key to the key that contains the text: text_key: {longest}"
    return (
        "write the training text as `messages`, or as `prompt` with `completion`; if one key "
        f"contains the complete text, set text_key to it, e.g. text_key: {longest}"
    )
