"""Chat templates of real models, from a folder, and what is learned through them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from stillhouse.data.documents import Conversation
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.data.turn_end import turn_end
from stillhouse.errors import DataError
from tests.chat_toys import chat, tokenizer

FOLDER = os.environ.get("STILLHOUSE_TEMPLATES", "")
GOLDEN = Path(__file__).with_name("golden.json")

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
INST = (*INST, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
DEEPSEEK = (*DEEPSEEK, "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>")
GRANITE = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>")
R1_EOS = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class Model:
    """source: a file of models/templates, or a name in test-chat-template.cpp. eos, bos, special:
    of the model's own tokenizer. ends: eos_token_id of its generation config, besides EOS."""

    source: str
    eos: str
    bos: str
    special: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


MODELS = {
    "Llama 2 (a fine-tuned one)": Model("bofenghuang/vigogne-2-70b-chat", "</s>", "<s>"),
    "Llama 3": Model("Llama-3", "<|eot_id|>", "<|begin_of_text|>", LLAMA_3),
    "Llama 3.1": Model(
        "meta-llama-Llama-3.1-8B-Instruct.jinja", "<|eot_id|>", "<|begin_of_text|>", LLAMA_3
    ),
    "Llama 3.2": Model(
        "meta-llama-Llama-3.2-3B-Instruct.jinja", "<|eot_id|>", "<|begin_of_text|>", LLAMA_3
    ),
    "Qwen 2.5": Model("Qwen-Qwen2.5-7B-Instruct.jinja", "<|im_end|>", "<|endoftext|>", IM),
    "Qwen 2.5 base": Model("Qwen-Qwen2.5-7B-Instruct.jinja", "<|endoftext|>", "<bos>", IM),
    "Qwen 3": Model(
        "Qwen-Qwen3-0.6B.jinja", "<|im_end|>", "<|endoftext|>", (*IM, "<think>", "</think>")
    ),
    "Gemma": Model("google/gemma-7b-it", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "Gemma 2": Model(
        "google-gemma-2-2b-it.jinja", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")
    ),
    "Gemma 4": Model(
        "google-gemma-4-31B-it.jinja",
        "<eos>",
        "<bos>",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    ),
    "Phi 3 mini": Model("Phi-3-mini", "<|endoftext|>", "<s>", PHI),
    "Phi 3 medium": Model("Phi-3-medium", "<|endoftext|>", "<s>", PHI),
    "Phi 3.5": Model("microsoft-Phi-3.5-mini-instruct.jinja", "<|endoftext|>", "<s>", PHI),
    "Phi 4": Model("phi-4", "<|im_end|>", "<|endoftext|>", (*IM, "<|im_sep|>")),
    "Mistral v0.2": Model(
        "mistralai/Mistral-7B-Instruct-v0.2 (NOTE: Old pre-v1 without a system prompt)",
        "</s>",
        "<s>",
    ),
    "Mistral v1": Model(
        "mistralai/Mistral-7B-Instruct-v0.2 (mistralai 'v1' template with a system prompt)",
        "</s>",
        "<s>",
    ),
    "Mistral v3": Model(
        "Mistral-Large-Instruct-2407 (mistralai 'v3' template; modified to have system prompt at "
        "start)",
        "</s>",
        "<s>",
        INST,
    ),
    "Mistral tekken": Model("mistralai-Mistral-Nemo-Instruct-2407.jinja", "</s>", "<s>", INST),
    "Mistral Small 3.2": Model(
        "Mistral-Small-3.2-24B-Instruct-2506.jinja",
        "</s>",
        "<s>",
        (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "Ministral 3 Reasoning": Model(
        "mistralai-Ministral-3-14B-Reasoning-2512.jinja",
        "</s>",
        "<s>",
        (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
    ),
    "DeepSeek R1 (Llama 8B)": Model(
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja",
        R1_EOS,
        "<｜begin▁of▁sentence｜>",
        DEEPSEEK,
    ),
    "DeepSeek R1 (Qwen 32B)": Model(
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja",
        R1_EOS,
        "<｜begin▁of▁sentence｜>",
        DEEPSEEK,
    ),
    "SmolLM 3": Model("HuggingFaceTB-SmolLM3-3B.jinja", "<|im_end|>", "<|begin_of_text|>", IM),
    "gpt-oss": Model("openai-gpt-oss-120b.jinja", "<|return|>", "<|startoftext|>", HARMONY),
    "Granite 3.0": Model(
        "ibm-granite/granite-3.0-8b-instruct", "<|end_of_text|>", "<bos>", GRANITE
    ),
    "Granite 3.3": Model(
        "ibm-granite-granite-3.3-2B-Instruct.jinja", "<|end_of_text|>", "<bos>", GRANITE
    ),
    "Granite 4.0": Model("ibm-granite-granite-4.0.jinja", "<|end_of_text|>", "<bos>", GRANITE),
    "GLM 4": Model("ChatGLM4", "<|endoftext|>", "<bos>", GLM, ("<|user|>", "<|observation|>")),
    "GLM 4.6": Model(
        "GLM-4.6.jinja", "<|endoftext|>", "<bos>", GLM, ("<|user|>", "<|observation|>")
    ),
    "Command R7B": Model(
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use.jinja",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
    ),
    "Seed-OSS": Model(
        "ByteDance-Seed-OSS.jinja",
        "<seed:eos>",
        "<seed:bos>",
        ("<seed:think>", "</seed:think>"),
    ),
    "Nemotron Nano 2": Model(
        "NVIDIA-Nemotron-Nano-v2.jinja", "<SPECIAL_12>", "<s>", ("<SPECIAL_10>", "<SPECIAL_11>")
    ),
    "Kimi K2": Model(
        "Kimi-K2-Thinking.jinja",
        "<|im_end|>",
        "[BOS]",
        ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    ),
}

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


def read_template(source: str, folder: Path) -> str:
    if source.endswith(".jinja"):
        (file,) = folder.rglob(f"models/templates/{source}")
        return file.read_text(encoding="utf-8")
    (file,) = folder.rglob("tests/test-chat-template.cpp")
    text = file.read_text(encoding="utf-8")
    start = text.index("/* .template_str= */", text.index(f'/* .name= */ "{source}"'))
    rest = text[start + len("/* .template_str= */") :].lstrip().removeprefix("U8C(")
    parts = []
    while found := re.match(r'\s*"((?:[^"\\]|\\.)*)"', rest):
        parts.append(json.loads(f'"{found[1]}"'.replace(r"\'", "'"), strict=False))
        rest = rest[found.end() :]
    return "".join(parts)


def model_tokenizer(model: Model, folder: Path) -> Any:
    words = tokenizer(
        read_template(model.source, folder), eos=model.eos, special=(model.bos, *model.special)
    )
    words.bos_token = model.bos
    if model.ends:
        beside = Path(tempfile.mkdtemp())
        ids = [words.eos_token_id, *words.convert_tokens_to_ids(list(model.ends))]
        text = json.dumps({"eos_token_id": ids})
        (beside / "generation_config.json").write_text(text, encoding="utf-8")
        words.name_or_path = str(beside)
    return words


def learned(conversation: Conversation, words: Any) -> list[Any] | str:
    """Of each row, in turn: characters of context, and the text that is learned; at last, what is
    left out on purpose. Or why the row is refused."""
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


def facts(name: str, folder: Path) -> dict[str, Any]:
    words = model_tokenizer(MODELS[name], folder)
    end = turn_end(words)
    assert end is not None
    rows = {kind: learned(conversation, words) for kind, conversation in CHATS.items()}
    return {"end": end.text, "written": end.written, **rows}


if __name__ == "__main__":
    every = {name: facts(name, Path(FOLDER)) for name in MODELS}
    text = json.dumps(every, ensure_ascii=False, indent=1)
    GOLDEN.write_text(re.sub(r"\[\s+([^\[\]]*?)\s+\]", r"[\1]", text) + "\n", encoding="utf-8")
